"""convert/rle.py: COCO's run-length code, judged by pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as cocomask

from diffumask_fast.convert import rle
from diffumask_fast.errors import DiffuMaskError


def random_masks():
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 0.98, 1):
        for height, width in ((1, 1), (1, 7), (9, 1), (24, 40), (300, 37)):
            yield rng.random((height, width)) < share


def test_code_is_that_of_pycocotools_and_reads_back():
    for mask in random_masks():
        height, width = mask.shape
        code = rle.encode(mask)
        assert code.encode() == cocomask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
        assert (rle.decode(code, height, width) == mask).all()
        lengths = rle.run_lengths(mask.ravel(order="F")).tolist()
        assert (rle.decode(lengths, height, width) == mask).all()


@pytest.mark.parametrize(
    "counts",
    ["", [], [3, 4], [3, 6], [-1, 9], [8.0], [True, 7], ["8"], [10**30], [[8]], "0", "P" * 30, "é", " ", "\0", "o" * 9],
)
def test_code_that_does_not_fill_its_mask_is_refused(counts):
    with pytest.raises(DiffuMaskError, match="a run-length code"):
        rle.decode(counts, 2, 4)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=127), max_size=30) | st.lists(st.integers(-2, 9)))
def test_any_code_is_a_mask_or_one_sentence(counts):
    try:
        mask = rle.decode(counts, 2, 4)
    except DiffuMaskError as error:
        assert "\n" not in str(error)
    else:
        assert mask.shape == (2, 4) and mask.dtype == bool
