"""What an image shows and how good a set of images is, by judges that know nothing of the generators."""
