"""A run: the job, the drawing of its shards, and the command that writes them."""
