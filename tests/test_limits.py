import json
from dataclasses import replace

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.limits import Limits

LIMITS = Limits(
    rows=(1, 8), height=(64, 128), width=(64, 256), multiple=32, vae_factor=8, channels=4, tokens=77, max_phrases=4,
    divisors={"0": 1, "1": 2, "2": 4}, propagated=("0", "1", "2"),
)  # fmt: skip


def test_what_is_inside_passes():
    LIMITS.check(4, 64, 256, phrases=4, propagate=1)
    LIMITS.check(1, 128, 64, phrases=1, propagate=4)


@pytest.mark.parametrize(
    "call, words",
    [
        ((5, 64, 64), "at most 4 images at once, not 5.*`max_batch=5`"),
        ((1, 32, 64), "height from 64 to 128 in multiples of 32, not 32"),
        ((1, 64, 288), "width from 64 to 256"),
        ((1, 80, 64), "height.*multiples of 32, not 80"),
        ((1, 64, 64, 5), "at most 4 phrases, and 5 phrases.*`max_phrases=5`"),
        ((1, 64, 64, 2, 3), "2 phrases propagated 3 times count as 6"),
    ],
)
def test_what_is_outside_is_one_sentence(call, words):
    with pytest.raises(DiffuMaskError, match=words):
        LIMITS.check(*call)


def test_a_level_that_the_graph_does_not_propagate_is_refused_only_where_it_is_needed():
    coarse = replace(LIMITS, height=(64, 512), width=(64, 512), propagated=("1", "2"))
    with pytest.raises(DiffuMaskError, match="level 0 .1024 pixels.*`propagate=none`"):
        coarse.check(1, 256, 256)
    coarse.check(1, 256, 256, propagate="none")
    coarse.check(1, 256, 288)  # 1152 pixels: too many to be propagated


def test_pixels_of_levels():
    assert LIMITS.level_pixels((8, 12)) == {"0": 96, "1": 24, "2": 6}


def test_a_static_engine_of_one_image_draws_one():
    assert replace(LIMITS, rows=(2, 2)).batch == 1 and LIMITS.batch == 4


def test_limits_survive_json():
    assert Limits.from_json(json.loads(json.dumps(LIMITS.as_json()))) == LIMITS
    with pytest.raises(KeyError):
        Limits.from_json({"rows": [1, 2]})
