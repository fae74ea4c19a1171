"""Attempts at shards: what is drawn on the device's thread, and what becomes of the images meanwhile."""
