"""From prompt files to a plan of shards."""
