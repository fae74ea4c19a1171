"""Statements that others file: what jobs used, in the form of a standard, with nothing filled in."""
