"""What follows the last shard: manifest and books, the check of an output, its garbage, later readings."""
