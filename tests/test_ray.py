"""generation/ray.py: a class that draws the rows of a batch; `test_cluster.py` has it in a pipeline of Ray Data."""

import numpy as np
import pytest

from diffumask_fast.dataset.schema import SCHEMA, decode_maps, decode_png
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.ray import Drawer

QUICK = {"loading": {"device": "cpu"}, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def drawer(tiny_folder):
    return Drawer(tiny_folder, classes="dog,cat,potted plant", batch_size=2, **QUICK)


def test_a_row_says_what_to_draw_by_class(drawer):
    table = drawer({"class": np.array(["dog", "potted plant"] * 2), "seed": np.array([3, 4, 3, 4])})
    rows = table.to_pylist()
    assert table.schema == SCHEMA and [row["key"] for row in rows] == ["dog-000003", "pottedplant-000004"] * 2
    assert [row["class_ids"] for row in rows] == [[12], [16]] * 2 and rows[:2] == rows[2:]
    assert rows[0]["prompt"].startswith("a photo of a dog ") and rows[0]["seed"] == 3
    for row in rows:
        pixels, mask = decode_png(row["image"]), decode_png(row["mask"])
        assert pixels.shape == (64, 64, 3) and set(np.unique(mask)) <= {0, *row["class_ids"]}
        assert decode_maps(row).shape[0] == 1 and len(row["quality"]) == 1


def test_a_row_says_what_to_draw_by_prompt_and_phrases(drawer):
    rows = drawer(
        {
            "prompt": np.array(["the dog and the cat on the sofa", "a potted plant"]),
            "phrases": np.array([["dog", "cat"], ["potted plant"]], dtype=object),
            "negative_prompt": np.array(["red", ""]),
            "seed": np.array([3, 4]),
            "key": np.array(["first", "second"]),
        }
    ).to_pylist()
    assert [(row["key"], row["classes"], row["negative_prompt"]) for row in rows] == [
        ("first", ["dog", "cat"], "red"), ("second", ["pottedplant"], ""),
    ]  # fmt: skip
    assert rows[0]["prompt"] == "the dog and the cat on the sofa" and rows[0]["class_ids"] == [12, 8]


def test_several_classes_share_a_caption(drawer):
    [row] = drawer({"class": np.array([["cat", "dog"]]), "seed": np.array([9])}).to_pylist()
    assert row["key"] == "cat+dog-000009" and row["classes"] == ["cat", "dog"]
    assert "a cat and a dog" in row["prompt"] and len(row["map_sizes"]) == 2


def test_a_row_that_cannot_be_drawn_is_one_sentence(drawer):
    for batch, words in (
        ({"class": ["dog"]}, "no column seed: give class and seed, or prompt, phrases and seed"),
        ({"seed": [1], "prompt": ["a dog"]}, "no column phrases"),
        ({"class": ["zebra"], "seed": [1]}, "no class zebra: name it in `classes`, which are dog, cat, pottedplant"),
        ({"class": [[]], "seed": [1]}, "no class is named"),
        ({"prompt": ["a cat"], "phrases": [["dog"]], "seed": [1]}, "dog"),
    ):
        with pytest.raises(DiffuMaskError, match=words):
            drawer(batch)
