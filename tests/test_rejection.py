"""masks/accept.py: why a sample is rejected."""

import torch

from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import ONE_COLOUR, advice, kind_of, rejections


def test_reasons():
    images = torch.randint(0, 256, (6, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[4] = 0
    mask = torch.zeros(6, 20, 20, dtype=torch.uint8)
    mask[0, :10] = 12  # fine
    mask[1, 0, :1] = 12  # 0.25 %
    mask[3] = 12  # all of it
    mask[4, :10] = 12  # on a black image
    mask[5, :5], mask[5, 5:10] = 12, 7  # fine, two classes
    ids = torch.tensor([[12, 0]] * 5 + [[12, 7]])
    names = [["dog"]] * 5 + [["dog", "car"]]
    good = torch.ones(6, 2)
    assert rejections(images, mask, ids, names, MaskOptions(), good) == [
        "",
        "dog covers 0.25% of the image, less than 0.50%",
        "dog has no pixel in the mask",
        "the classes cover 100.00% of the image, more than 95.00%",
        "the image is of one colour",
        "",
    ]
    loose = MaskOptions(min_area=0, max_area=1)
    assert [bool(reason) for reason in rejections(images, mask, ids, names, loose, good)] == [0, 0, 1, 0, 1, 0]


def test_the_second_class_counts():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
    mask[0, :8] = 12
    reason = rejections(images, mask, torch.tensor([[12, 7]]), [["dog", "car"]], MaskOptions(), torch.ones(1, 2))
    assert reason == ["car has no pixel in the mask"]


def test_a_poor_mask_is_rejected_where_that_is_asked_for():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    mask = torch.zeros(2, 16, 16, dtype=torch.uint8)
    mask[:, :8], mask[:, 10:12] = 12, 7
    quality, ids = torch.tensor([[0.9, 0.31], [0.9, 0.5]]), torch.tensor([[12, 7]] * 2)
    names = [["dog", "car"]] * 2
    assert rejections(images, mask, ids, names, MaskOptions(), quality) == ["", ""]
    reasons = rejections(images, mask, ids, names, MaskOptions(min_quality=0.5), quality)
    assert reasons == ["the mask of car has quality 0.31, less than 0.50", ""]


def test_one_s_own_limit_is_the_one_to_move():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(3, -1, -1, 3)
    mask = torch.zeros(3, 16, 16, dtype=torch.uint8)
    mask[:, :8] = 12

    def told(**limits):
        options = MaskOptions(**limits)
        reasons = rejections(images, mask, torch.tensor([[12]] * 3), [["dog"]] * 3, options, torch.full((3, 1), 0.4))
        assert all(reasons) == bool(limits)
        return advice(reasons, options)

    assert told() == ""
    assert told(min_quality=0.9) == "lower `min_quality`"
    assert told(min_area=0.7) == "lower `min_area`"
    assert told(max_area=0.2) == "raise `max_area`"


def test_the_most_common_reason_counts_and_a_default_is_not_one_s_own():
    empty, small = "dog has no pixel in the mask", "dog covers 0.10% of the image, less than 0.50%"
    poor = [f"the mask of dog has quality 0.{number}, less than 0.90" for number in range(10, 13)]
    assert advice([empty, *poor, "", "", "", ""], MaskOptions(min_quality=0.9)) == "lower `min_quality`"
    assert advice([empty] * 4 + poor, MaskOptions(min_quality=0.9)) == ""
    assert advice([small], MaskOptions()) == advice([], MaskOptions(min_quality=0.9)) == ""


def test_a_kind_has_no_numbers_and_gives_the_same_advice():
    reasons = {
        "the mask of dog has quality 0.11, less than 0.90": "quality below `min_quality`",
        "dog covers 0.10% of the image, less than 0.50%": "smaller than `min_area`",
        "the classes cover 99.00% of the image, more than 95.00%": "larger than `max_area`",
        "dog has no pixel in the mask": "no pixel in the mask",
        ONE_COLOUR: ONE_COLOUR,
    }
    options = MaskOptions(min_quality=0.9, min_area=0.1, max_area=0.5)
    for reason, kind in reasons.items():
        assert kind_of(reason) == kind and advice([reason], options) == advice([kind], options)
