"""Models, where users have them: the hub, a bucket, a folder; and how every node comes to the same files."""
