"""`make gpu`: what waits for a GPU, in order of worth."""
