"""Several processes that draw an image together: a denoiser too large for one device, a part of its weights on each."""
