"""Models: find, check, hash and load them; devices, schedulers, decoding."""
