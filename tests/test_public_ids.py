"""prompts/public_ids.py: numbers as the public datasets' own files have them."""

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.public_ids import public_ids, supercategory
from diffumask_fast.prompts.vocabulary import Vocabulary


def numbered(name):
    return dict(zip(Vocabulary.shipped(name).names, public_ids(name), strict=True))


def test_cocos_category_ids_have_its_gaps():
    ids = numbered("coco")
    places = {"person": 1, "fire hydrant": 11, "stop sign": 13, "dog": 18, "backpack": 27, "umbrella": 28,
              "handbag": 31, "wine glass": 46, "bottle": 44, "dining table": 67, "toilet": 70, "tv": 72,
              "refrigerator": 82, "book": 84, "toothbrush": 90}  # fmt: skip
    assert len(ids) == 80 and places.items() <= ids.items()
    kinds = {1: "person", 2: "vehicle", 10: "outdoor", 16: "animal", 27: "accessory", 34: "sports", 44: "kitchen",
             52: "food", 62: "furniture", 72: "electronic", 78: "appliance", 84: "indoor", 90: "indoor"}  # fmt: skip
    assert {number: supercategory(number) for number in kinds} == kinds


def test_the_other_lists():
    labels = {"road": 7, "traffic light": 19, "person": 24, "car": 26, "train": 31, "bicycle": 33}
    assert labels.items() <= numbered("cityscapes").items()
    assert numbered("ade20k")["flag"] == 150 and numbered("voc")["tvmonitor"] == 20
    with pytest.raises(DiffuMaskError, match="'ade20k-3' is no public dataset: name one of voc, coco"):
        public_ids("ade20k-3")
