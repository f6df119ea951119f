"""Maps to masks: thresholds, refinement, quality."""
