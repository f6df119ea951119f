"""convert/voc_folder.py: VOC's layout as a source; hostile lists and pictures are one sentence."""

import numpy as np
import pytest
from foreign import converted, dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffumask_fast.convert.voc_folder import VocFolder
from diffumask_fast.errors import DiffuMaskError


@pytest.fixture
def folder(tmp_path):
    return converted(dataset(tmp_path / "a", 3), tmp_path / "b", "voc")


def names_file(folder):
    return folder / "ImageSets" / "Segmentation" / "train.txt"


def test_heads_and_pixels(folder):
    source = VocFolder(folder, None, 10**6)
    assert len(source) == 3 and source.classes == {0: "background", 1: "dog", 2: "traffic light"}
    assert source.head(1).name == "dog+traffic-light-000001" and source.head(1).class_ids == (1, 2)
    assert source.pixels(1).image.shape == (37, 29, 3) and set(np.unique(source.pixels(1).mask)) == {0, 1, 2, 255}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a\\b"])
def test_hostile_lists_are_refused(folder, name):
    names_file(folder).write_text(name + "\n")
    with pytest.raises(DiffuMaskError, match="is no name of a file"):
        VocFolder(folder, None, 10**6)


def test_a_hostile_class_name_is_refused(folder, tmp_path):
    from diffumask_fast.convert.import_folder import import_folder
    from diffumask_fast.convert.options import ImportOptions

    (folder / "labelmap.txt").write_text("background:0,0,0::\n../dog:128,0,0::\nlight:0,128,0::\n")
    with pytest.raises(DiffuMaskError, match="class name '../dog' cannot stand in file names"):
        import_folder(ImportOptions(folder, tmp_path / "c", "voc"))
    assert not (tmp_path / "c").exists()


def test_a_picture_too_large_and_sizes_that_differ(folder):
    with pytest.raises(DiffuMaskError, match="more than 900 pixels"):
        VocFolder(folder, None, 900).head(0)
    path = folder / "JPEGImages" / "dog+traffic-light-000000.png"
    Image.open(path).resize((5, 5)).save(path)
    with pytest.raises(DiffuMaskError, match="has 5x5 pixels and its mask 24x40"):
        VocFolder(folder, None, 10**6).pixels(0)


def test_another_layout(tmp_path):
    with pytest.raises(DiffuMaskError, match="name a folder in VOC's layout"):
        VocFolder(tmp_path, None, 10**6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files_are_one_sentence(tmp_path_factory, data):
    folder = converted(dataset(tmp_path_factory.mktemp("x") / "a", 1), tmp_path_factory.mktemp("y") / "b", "voc")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path.write_bytes(content)
    try:
        source = VocFolder(folder, "train", 10**6)
        assert source.head(0).class_ids is not None and source.pixels(0).mask.dtype == np.uint8
    except DiffuMaskError as error:
        assert "\n" not in str(error)
