"""Two generators compared: registration, statistic, quality gate, bundle, and its offline check."""
