"""The ladder's rungs: switches that make a diffusion pipeline need less energy, and what each changes."""
