"""Training: the loop that all trainings share, and one file per model."""
