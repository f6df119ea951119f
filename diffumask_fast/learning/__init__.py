"""What the datasets are for: judging masks, and training on them."""
