"""Where words look: maps out of the attention of a running diffusers pipeline."""
