"""learning/data.py: what is in a folder decides how it is read; what does not fit together is named."""

import dataclasses

import numpy as np
import pytest
from samples import draw, requests

from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.data import Example, checked_example, open_data
from diffumask_fast.prompts.vocabulary import Vocabulary


def dataset(folder, change=lambda sample: sample, classes="dog,car"):
    plan = requests(7, classes)
    with open_run(folder, plan, {}, {}, 3, vocabulary=Vocabulary.parse(classes)) as run:
        for index in run.missing_shards():
            run.write(index, [change(draw(request)) for request in run.requests_of(index)])
    return folder


def test_accepted_rows_of_a_dataset(tmp_path):
    drawn = [draw(request) for request in requests(7)]
    for accepted_only, wanted in ((True, [one for one in drawn if one.accepted]), (False, drawn)):
        data = open_data(dataset(tmp_path / "a"), accepted_only=accepted_only)
        assert len(data) == len(wanted) and data.names == [one.request.key for one in wanted]
        assert data.classes == {0: "background", 7: "car", 12: "dog"}
        for index in reversed(range(len(data))):
            example = data[index]
            assert example.name == wanted[index].request.key
            assert np.array_equal(example.image, wanted[index].image) and example.image.dtype == np.uint8
            assert np.array_equal(example.labels, wanted[index].mask) and example.labels.dtype == np.uint8
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to(dataset(tmp_path / "a"))
    assert len(open_data(str(tmp_path / "link"))) == len(open_data(tmp_path / "a"))


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_no_data_there(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DiffuMaskError, match=f"{name} holds no data: name a dataset .* import makes"):
        open_data(tmp_path / name)


def test_a_dataset_has_no_splits(tmp_path):
    with pytest.raises(DiffuMaskError, match="without splits: leave out `split`"):
        open_data(dataset(tmp_path / "a"), split="train")


def test_a_dataset_without_an_accepted_row(tmp_path):
    dataset(tmp_path / "a", lambda sample: dataclasses.replace(sample, accepted=False, reason="too small"))
    with pytest.raises(DiffuMaskError, match="holds no accepted row"):
        open_data(tmp_path / "a")
    assert len(open_data(tmp_path / "a", accepted_only=False)) == 7


def test_ids_that_are_no_class(tmp_path):
    def change(sample):
        sample.mask[0, :2] = 44, 31
        return sample

    data = open_data(dataset(tmp_path / "a", change))
    with pytest.raises(DiffuMaskError, match=f"mask of {data.names[1]} holds 31, 44, which are no class of the data"):
        data[1]
    assert data.names  # what does not decode is still there to be named


def test_images_and_masks_of_two_sizes():
    example = Example("dog-1", np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4), np.uint8))
    with pytest.raises(DiffuMaskError, match="image of dog-1 has 4x6 pixels and its mask 6x4: bring both to one size"):
        checked_example(example, {0: "background"})


def test_an_image_all_ignored_is_an_example(tmp_path):
    def change(sample):
        sample.mask[:] = 255
        return sample

    assert (open_data(dataset(tmp_path / "a", change))[0].labels == 255).all()


def test_one_class_only(tmp_path):
    data = open_data(dataset(tmp_path / "a", classes="dog"))
    assert data.classes == {0: "background", 12: "dog"} and len(data) > 0


def test_pictures_that_are_too_large(tmp_path):
    data = open_data(dataset(tmp_path / "a"), max_pixels=24 * 40 - 1)
    with pytest.raises(DiffuMaskError, match="has 24x40, more than 959 pixels"):
        data[0]
