"""Meters outside the devices, of a whole node."""
