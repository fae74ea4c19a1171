"""Where everything durable lives: one `Store` over a local folder or an S3 bucket."""
