"""One driver's run of a job: workers in, commits out."""
