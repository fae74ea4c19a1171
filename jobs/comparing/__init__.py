"""`millijoule verify`: the run of a registered comparison, and reading its images again."""
