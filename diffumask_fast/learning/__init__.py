"""The use of datasets: judging masks, and training on them."""
