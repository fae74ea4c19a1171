"""What a running job tells others while it works, beside Ray's own metrics."""
