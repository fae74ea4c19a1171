"""Images as files: encoded, written in the output formats, read back."""
