"""convert/coco_folder.py: COCO's layout as a source; hostile annotations are one sentence."""

import json

import numpy as np
import pytest
from foreign import converted, dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffumask_fast.convert.coco_folder import CocoFolder
from diffumask_fast.errors import DiffuMaskError

SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]


def content(**changes):
    base = {
        "images": [{"id": 7, "file_name": "x.png", "height": 4, "width": 5}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 90, "name": "tooth brush"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "segmentation": [SQUARE]}],
    }
    return base | changes


def source(tmp_path, what, split=None, image=(4, 5)):
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "images" / "train").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*image, 3), np.uint8)).save(tmp_path / "images" / "train" / "x.png")
    (tmp_path / "annotations" / "instances_train.json").write_text(what if isinstance(what, str) else json.dumps(what))
    return CocoFolder(tmp_path, split, 10**6)


def one(**changes):
    return content(annotations=[content()["annotations"][0] | changes])


def test_polygons_alone_are_filled(tmp_path):
    opened = source(tmp_path, content())
    assert opened.classes == {0: "background", 1: "dog", 90: "tooth brush"}
    expected = np.zeros((4, 5))
    expected[1:3, 1:3] = 90
    assert (opened.pixels(0).mask == expected).all()
    assert (opened.head(0).name, opened.head(0).class_ids, opened.head(0).seed) == ("x", (90,), None)


def test_what_two_classes_claim_or_is_marked_is_ignored(tmp_path):
    other = {"id": 2, "image_id": 7, "category_id": 1, "segmentation": {"size": [4, 5], "counts": [9, 11]}}
    marked = {**other, "id": 3, "segmentation": {"size": [4, 5], "counts": [0, 3, 17]}, "iscrowd": 1, "ignore": 1}
    again = content()["annotations"][0]
    mask = source(tmp_path, content(annotations=[again, again, other, marked])).pixels(0).mask
    expected = np.array([[255, 0, 0, 1, 1], [255, 90, 255, 1, 1], [255, 90, 255, 1, 1], [0, 0, 1, 1, 1]])
    assert (mask == expected).all()


def test_crowds_are_of_their_class(tmp_path):
    crowd = one(iscrowd=1, segmentation={"size": [4, 5], "counts": [4, 16]})
    assert (source(tmp_path, crowd).pixels(0).mask == np.array([[0] + [90] * 4] * 4)).all()


def test_ids_that_masks_cannot_hold_are_numbered(tmp_path):
    named = content(categories=[{"id": 0, "name": "dog"}, {"id": 90, "name": "cat"}, {"id": 3000, "name": "cow"}])
    opened = source(tmp_path, named)
    assert opened.classes == {0: "background", 1: "dog", 2: "cat", 3: "cow"} and opened.head(0).class_ids == (2,)


def test_prompts_of_ours_come_back(tmp_path):
    out = converted(dataset(tmp_path / "a", 3), tmp_path / "b", "coco")
    head = CocoFolder(out, None, 10**6).head(2)
    assert (head.prompt, head.seed) == ("a photo of dog and traffic light, number 1", 2)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("{half", "cannot be read as JSON"),
        ("[" * 10**5, "cannot be read as JSON"),
        ("[]", "holds no object"),
        ("{}", "does not hold images, annotations and categories"),
        (content(images=[{"id": 7, "file_name": "../../x.png", "height": 4, "width": 5}]), "is no name of a file"),
        (content(images=[{"id": 7, "file_name": "/etc/passwd", "height": 4, "width": 5}]), "is no name of a file"),
        (content(images=[{"id": 7, "file_name": 5, "height": 4, "width": 5}]), "is no name of a file"),
        (content(images=content()["images"] * 2), "does not hold images"),
        (content(images=[{"id": 7, "file_name": "x.png", "height": -4, "width": 5}]), "does not hold images"),
        (
            content(images=[{"id": 7, "file_name": "x.png", "height": 10**5, "width": 10**5}]),
            "more than 1000000 pixels",
        ),
        (one(category_id=4), "does not hold images"),
        (one(image_id=[7]), "does not hold images"),
        (one(segmentation=None), "has no segmentation: import needs masks, not boxes"),
        (one(segmentation=[]), "has no segmentation: import needs masks, not boxes"),
        (one(segmentation=[[1, 2, 3]]), "a polygon must be"),
        (one(segmentation={"size": [4, 5], "counts": [5, 99]}), "does not fill its mask of 4x5 exactly"),
        (one(segmentation={"size": [4, 5], "counts": "0" * 99}), "a run-length code"),
        (one(segmentation={"size": [5, 4], "counts": [20]}), "has the size .5, 4. and its image .4, 5."),
        (one(segmentation={"counts": [20]}), "has the size None"),
    ],
)
def test_hostile_annotations_are_one_sentence(tmp_path, what, sentence):
    with pytest.raises(DiffuMaskError, match=sentence) as error:
        source(tmp_path, what).head(0)
    assert "\n" not in str(error.value)


def test_images_that_are_missing_or_of_another_size(tmp_path):
    with pytest.raises(DiffuMaskError, match="x.png has 6x5 pixels, and .*json says 4x5"):
        source(tmp_path, content(), image=(6, 5)).pixels(0)
    opened = source(tmp_path, content())
    (tmp_path / "images" / "train" / "x.png").unlink()
    with pytest.raises(DiffuMaskError, match="x.png is missing"):
        opened.pixels(0)
    (tmp_path / "images" / "train" / "x.png").symlink_to("/etc/passwd")
    with pytest.raises(DiffuMaskError, match="x.png is a link"):
        opened.pixels(0)


def test_a_split_must_be_named_where_there_are_several(tmp_path):
    source(tmp_path, content())
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content()))
    with pytest.raises(DiffuMaskError, match="name a `split`; it has train, val2017"):
        CocoFolder(tmp_path, None, 10**6)
    assert len(CocoFolder(tmp_path, "val2017", 10**6)) == 1
    with pytest.raises(DiffuMaskError, match="it has no annotations/instances_"):
        CocoFolder(tmp_path / "images", None, 10**6)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["images", "categories", "annotations"]),
    st.sampled_from(["id", "file_name", "height", "width", "name", "image_id", "category_id", "segmentation", None]),
    JSON,
)
def test_anything_is_a_mask_or_one_sentence(tmp_path, part, name, value):
    what = content()
    if name is None:
        what[part] = value
    else:
        what[part][0][name] = value
    try:
        opened = source(tmp_path, what)
        for index in range(len(opened)):
            assert opened.head(index).name and opened.pixels(index).mask.dtype == np.uint8
    except DiffuMaskError as error:
        assert "\n" not in str(error)
