"""From options to a planned job on a cluster."""
