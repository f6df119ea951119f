"""bench/photographs.py on pictures made here: gains are positive where refinement can gain."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_make import LEFT, ONE, disc, picture

from diffumask_fast.bench.photographs import CELLS, coarse_map, run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.crf import PRESETS


@pytest.fixture
def photos(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "set" / part).mkdir(parents=True)
    for number, shape in enumerate((ONE, LEFT, disc(0.5, 0.5, 0.3))):
        Image.fromarray(picture(shape).numpy()).resize((192, 192)).save(tmp_path / f"set/images/{number}.jpg")
        mask = Image.fromarray(np.where(shape.numpy(), 12, 0).astype(np.uint8))
        mask.resize((192, 192), Image.Resampling.NEAREST).save(tmp_path / f"set/masks/{number}.png")
    return tmp_path


def test_gains(photos):
    rows = {row["name"]: row for row in run(photos, crf_every=3)}
    for setting in ("default", "guided", "crf"):
        assert {f"{setting}_gain_{level}" for level in (*CELLS, "mean")} <= set(rows)
    assert rows["default_gain_mean"]["value"] > 0.1 and rows["default_gain_mean"]["config"]["share"] == 1
    assert rows["default_gain_mean"]["n"] == 3 and rows["crf_gain_mean"]["n"] == 1
    assert all(rows[f"pydensecrf_{preset}_mean"]["value"] >= 0.97 for preset in PRESETS)
    assert 0 < rows["plain_16"]["value"] < rows["plain_64"]["value"] < 1
    assert {"cpu", "commit"} <= set(rows["plain_16"]["config"])


def test_coarse_maps_are_noisy_means():
    maps = coarse_map(ONE, 16, torch.Generator().manual_seed(0))
    assert maps.shape == (1, 1, 16, 16) and maps.min() >= 0 and maps.max() == 1
    clear = torch.nn.functional.adaptive_avg_pool2d(ONE[None, None].float(), 16)
    assert torch.corrcoef(torch.stack([maps.flatten(), clear.flatten()]))[0, 1] > 0.9
    assert not torch.equal(maps, coarse_map(ONE, 16, torch.Generator().manual_seed(1)))


def test_a_folder_without_photographs(tmp_path):
    with pytest.raises(DiffuMaskError, match="photographs"):
        run(tmp_path)
