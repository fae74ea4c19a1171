"""A job's report: data from its files, then a page, JSON or terminal tables."""
