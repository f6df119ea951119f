"""A page that shows a dataset."""
