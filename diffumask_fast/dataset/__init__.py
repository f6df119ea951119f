"""What is kept: schema, shards, reader, preview."""
