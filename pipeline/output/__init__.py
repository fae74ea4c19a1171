"""What lies in an output folder while a job runs: the job, its commits, and what no commit carries."""
