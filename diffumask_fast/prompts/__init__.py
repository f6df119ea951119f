"""What to draw: vocabularies, requests and the planner."""
