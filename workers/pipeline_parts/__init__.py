"""What a diffusion pipeline is put together from: its weights among many files, another decoder, another scheduler."""
