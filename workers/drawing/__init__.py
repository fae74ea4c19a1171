"""Calling a generator safely: what it returns is checked, batches fit the device, and failures stand alone."""
