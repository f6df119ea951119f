"""learning/figures.py: figures as people read them."""

from pathlib import Path

from diffumask_fast.learning.figures import table
from diffumask_fast.learning.options import EvaluateOptions

FIGURES = {
    "n": 2, "miou": 0.51234, "per_class_iou": {"dog": 0.5, "cat": None}, "ignored_share": 0.125,
    "confusion": {"classes": ["background", "dog"], "predicted": ["background", "dog", "other"],
                  "counts": [[0, 0, 0], [25, 70, 5]]},
}  # fmt: skip


def test_a_table_says_what_was_taken_for_what():
    lines = list(table(FIGURES, EvaluateOptions("model", Path("data"))))
    assert lines[0].split() == ["n", "2"] and lines[1].split() == ["miou", "0.512"]
    assert "12.50% of the masks' pixels are 255, and left out." in lines
    assert any(line.split() == ["cat", "-"] for line in lines)
    assert lines[-1].split(maxsplit=1) == ["dog", "dog 70.0%, background 25.0%, other 5.0%"]
    assert not any(line.startswith("background") for line in lines)  # none of its pixels
