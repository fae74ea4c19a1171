"""Energy counters and power of a worker's own devices."""
