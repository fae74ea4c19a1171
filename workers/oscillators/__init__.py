"""The oscillator generator: codes of icons to integer shares of pixels, and shares to images."""
