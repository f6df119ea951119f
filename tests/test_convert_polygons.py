"""convert/polygons.py: pixels whose centres lie in a polygon."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path
from pycocotools import mask as cocomask

from diffumask_fast.convert.polygons import fill
from diffumask_fast.errors import DiffuMaskError


def test_a_rectangle_and_a_hole_by_crossing():
    mask = fill([[2, 1, 7, 1, 7, 5, 2, 5]], 6, 9)
    assert mask[1:5, 2:7].all() and mask.sum() == 20
    ring = [1, 1, 8, 1, 8, 5, 1, 5, 1, 1, 3, 2, 3, 4, 6, 4, 6, 2, 3, 2]
    assert fill([ring], 6, 9).sum() == 28 - 6


def test_corners_on_centres_of_pixels_leave_no_row_out():
    diamond = fill([[2.5, 0.5, 4.5, 2.5, 2.5, 4.5, 0.5, 2.5]], 5, 5)
    assert diamond.sum(1).tolist() == [0, 2, 4, 2, 0]


def test_polygons_as_matplotlib_and_nearly_as_pycocotools():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :80]
    centres = np.stack([x.ravel(), y.ravel()], 1) + 0.5
    for count in (3, 8, 700):
        angles, radius = np.sort(rng.random(count)) * 2 * np.pi, 20 + 15 * rng.random(count)
        points = np.stack([40 + radius * np.cos(angles), 30 + radius * np.sin(angles)], 1)
        mask = fill([points.ravel().tolist()], 60, 80)
        assert (mask == Path(points).contains_points(centres).reshape(60, 80)).all()
        theirs = cocomask.decode(cocomask.frPyObjects([points.ravel().tolist()], 60, 80))[..., 0] > 0
        assert (mask & theirs).sum() / (mask | theirs).sum() > (0.9 if count < 100 else 0.7)


def test_parts_outside_are_cut_off_and_several_are_joined():
    assert fill([[-1e8, -1e8, 1e8, -1e8, 1e8, 1e8, -1e8, 1e8]], 4, 5).all()
    assert fill([[0, 0, 2, 0, 2, 2, 0, 2], [3, 3, 4, 3, 4, 4, 3, 4]], 4, 5).sum() == 5


@pytest.mark.parametrize(
    "polygon",
    [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, "6"], [float("nan")] * 6, [1e300] * 6, None, "abcdef"],
)
def test_what_is_no_polygon_is_refused(polygon):
    with pytest.raises(DiffuMaskError, match="a polygon must be"):
        fill([polygon], 4, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats() | st.integers(-99, 99), max_size=9), max_size=3))
def test_anything_is_a_mask_or_one_sentence(polygons):
    try:
        assert fill(polygons, 5, 7).shape == (5, 7)
    except DiffuMaskError as error:
        assert "\n" not in str(error)
