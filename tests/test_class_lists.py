"""learning/class_lists.py: classes of two lists meet by name."""

import numpy as np
import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.class_lists import channels, lookup, united

OURS = {0: "background", 3: "bird", 12: "dog"}
THEIRS = {0: "background", 1: "dog", 3: "cat", 4: "tree"}


def test_united_keeps_ids_and_finds_free_ones():
    assert united(OURS, THEIRS) == {0: "background", 1: "cat", 3: "bird", 4: "tree", 12: "dog"}
    assert united(OURS, OURS) == OURS


def test_lookup_goes_by_name():
    table = lookup(THEIRS, OURS, missing=7)
    assert table[[0, 1, 3, 4, 255]].tolist() == [0, 12, 7, 7, 255] and table.dtype == np.uint8


def test_channels_are_in_the_order_of_the_ids():
    assert channels({12: "dog", 0: "background", 3: "bird"})[[0, 3, 12, 255, 5]].tolist() == [0, 1, 2, 255, 255]


def test_more_classes_than_a_mask_has_numbers():
    many = {number: str(number) for number in range(255)}
    with pytest.raises(DiffuMaskError, match="more than 254 classes together"):
        united(many, THEIRS)
