"""bench/quality.py: rows of mini's masks, and ranks."""

import pytest

from diffumask_fast.bench.quality import PROPAGATE, rank_correlation, run
from diffumask_fast.errors import DiffuMaskError


def test_rows_of_a_few_images():
    rows = list(run(device="cpu", num=8, settings=("otsu-colour", "otsu-none", "0.55-colour")))
    values = {row["name"]: row["value"] for row in rows}
    assert len(values) == 3 * len(PROPAGATE)
    assert values["1-otsu-colour"] > values["1-otsu-none"] + 0.02
    assert values["1-otsu-colour"] > values["none-otsu-colour"]
    assert values["1-otsu-colour"] > 0.75
    config = rows[0]["config"]
    assert 0 < config["boundary_iou"] < 1 and config["cpu_ms"] > 0 and -1 <= config["quality_rank"] <= 1


def test_ranks():
    assert rank_correlation([3, 1, 2], [9, 1, 4]) == pytest.approx(1)
    assert rank_correlation([3, 1, 2], [-9, -1, -4]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


@pytest.mark.parametrize("change", [{"geometry": "sd15"}, {"settings": ("best",)}])
def test_refuses(change):
    with pytest.raises(DiffuMaskError, match="use"):
        run(**change)
