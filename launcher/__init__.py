"""Ways of starting a job, one readable script each; see README.md beside this file."""
