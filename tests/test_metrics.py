"""learning/metrics.py: the figures are torchmetrics' and mmseg's, on random masks with 255."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.metrics import (
    SegmentationMetrics,
    binary_iou,
    boundary,
    boundary_width,
    harmonic_mean,
    merge_classes,
    official_width,
)

CLASSES = {0: "background", 1: "cat", 2: "dog", 3: "person", 4: "rider", 5: "zebra"}  # no zebra is drawn


def random_masks(seed, count=6, height=40, width=56, ignored=0.1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (count, height // 8, width // 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    predicted = np.where(rng.random(labels.shape) < 0.3, rng.integers(0, 5, labels.shape, dtype=np.uint8), labels)
    labels[rng.random(labels.shape) < ignored] = 255
    return labels, predicted.astype(np.uint8)


def counted(labels, predicted, classes=CLASSES, unseen=()):
    metrics = SegmentationMetrics(classes, unseen)
    for pair in zip(labels, predicted, strict=True):
        metrics.update(*pair)
    return metrics.compute()


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_torchmetrics(seed):
    labels, predicted = random_masks(seed)
    figures = counted(labels, predicted)
    pair = torch.from_numpy(predicted).long(), torch.from_numpy(labels).long()
    options = {"num_classes": 6, "ignore_index": 255}
    ious = MulticlassJaccardIndex(average="none", **options)(*pair)
    assert [figures["background_iou"], *figures["per_class_iou"].values()][:5] == pytest.approx(
        ious[:5].tolist(), abs=1e-6
    )
    assert figures["per_class_iou"]["zebra"] is None
    mean = MulticlassJaccardIndex(average="macro", **options)(*pair)
    assert figures["miou_with_background"] == pytest.approx(mean.item(), abs=1e-6)
    accuracy = MulticlassAccuracy(average="micro", **options)(*pair)
    assert figures["pixel_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
    matrix = MulticlassConfusionMatrix(**options)(*pair)
    assert np.array_equal(np.array(figures["confusion"]["counts"])[:, :6], matrix.numpy())
    assert figures["ignored_share"] == pytest.approx((labels == 255).mean())


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_mmsegs(seed):
    """mmseg sums histograms of the pixels that agree, that are predicted and that are right over the images."""
    labels, predicted = random_masks(seed + 10)
    areas = np.zeros((3, 6))
    for right, said in zip(labels, predicted, strict=True):
        right, said = right[right != 255], said[right != 255]
        for row, values in enumerate((said[said == right], said, right)):
            areas[row] += np.histogram(values, bins=np.arange(7))[0]
    with np.errstate(invalid="ignore"):
        ious = areas[0] / (areas[1] + areas[2] - areas[0])
    figures = counted(labels, predicted)
    assert figures["miou_with_background"] == pytest.approx(np.nanmean(ious), abs=1e-6)
    assert figures["miou"] == pytest.approx(np.nanmean(ious[1:]), abs=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx(areas[0].sum() / areas[2].sum(), abs=1e-6)


def test_boundaries_are_those_of_each_class_over_all_images():
    labels, predicted = random_masks(3, ignored=0)
    for name, width in (("3px_at_128", boundary_width), ("ratio_0.02", official_width)):
        ious = []
        for value in range(1, 5):
            sums = np.zeros(2)
            for pair in zip(labels, predicted, strict=True):
                right, said = (boundary(part == value, width(part.shape)) for part in pair)
                sums += (right & said).sum(), (right | said).sum()
            ious.append(sums[0] / sums[1])
        assert counted(labels, predicted)[f"boundary_miou_{name}"] == pytest.approx(np.mean(ious))


def test_what_is_ignored_makes_no_boundary_and_no_figure():
    labels = np.zeros((1, 32, 32), np.uint8)
    labels[0, 8:24, 8:24] = 1
    predicted = labels.copy()
    ring = boundary(labels[0] > 0, 3)
    labels[0][ring], predicted[0][ring] = 255, 2
    figures = counted(labels, predicted)
    assert figures["miou"] == 1 and figures["per_class_iou"]["dog"] is None
    assert figures["boundary_miou_3px_at_128"] == 1


def test_an_image_has_the_mean_of_its_own_classes():
    labels, predicted = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    metrics = SegmentationMetrics(CLASSES)
    assert metrics.update(labels, predicted) is None
    labels[:4], predicted[:2] = 1, 1
    assert metrics.update(labels, predicted) == 0.5
    predicted[6:] = 2
    assert metrics.update(labels, predicted) == 0.25


def test_a_predicted_class_without_a_figure_is_wrong():
    labels, predicted = np.ones((1, 4, 4), np.uint8), np.full((1, 4, 4), 77, np.uint8)
    figures = counted(labels, predicted)
    assert figures["per_class_iou"]["cat"] == 0 and figures["pixel_accuracy"] == 0
    assert (
        figures["confusion"]["counts"][1] == [0, 0, 0, 0, 0, 0, 16] and figures["confusion"]["predicted"][-1] == "other"
    )


def test_merged_classes_are_one_before_they_are_counted():
    labels, predicted = random_masks(7)
    classes, lookup = merge_classes(CLASSES, "human=person,rider;pet=dog,cat")
    assert classes == {0: "background", 1: "pet", 3: "human", 5: "zebra"}
    figures = counted(lookup[labels], lookup[predicted], classes)
    known = labels != 255
    right, said = (np.isin(part, (3, 4)) & known for part in (labels, predicted))
    assert figures["per_class_iou"]["human"] == pytest.approx((right & said).sum() / (right | said).sum())
    assert merge_classes(CLASSES, "person=person,rider")[0][3] == "person"


def test_zero_shot_figures():
    labels, predicted = random_masks(9)
    figures = counted(labels, predicted, unseen=["dog", "rider"])
    ious = figures["per_class_iou"]
    assert figures["seen_miou"] == pytest.approx((ious["cat"] + ious["person"]) / 2)
    assert figures["unseen_miou"] == pytest.approx((ious["dog"] + ious["rider"]) / 2)
    s, u = figures["seen_miou"], figures["unseen_miou"]
    assert figures["harmonic_mean"] == pytest.approx(2 * s * u / (s + u))
    assert harmonic_mean(0.714, 0.65) == pytest.approx(0.681, abs=1e-3)  # DiffuMask's own, Swin-B
    assert harmonic_mean(0.0, 0.0) == 0 and harmonic_mean(None, 1.0) is None


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ("person,rider", "must be like human=person,rider"),
        ("human=", "must be like"),
        ("human=person,unicorn", "names unicorn, which is none of cat, dog, person, rider, zebra"),
        ("a=cat;b=cat", "names cat, which is none of"),
        ("dog=cat,zebra", "makes a second dog"),
        ("background=cat,zebra", "makes a second background"),
    ],
)
def test_a_merge_that_cannot_be_is_one_sentence(merge, says):
    with pytest.raises(DiffuMaskError, match=says):
        merge_classes(CLASSES, merge)


def test_nothing_to_judge_is_one_sentence():
    with pytest.raises(DiffuMaskError, match="no pixel to judge"):
        SegmentationMetrics(CLASSES).compute()
    with pytest.raises(DiffuMaskError, match="all 255"):
        counted(np.full((1, 4, 4), 255, np.uint8), np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(DiffuMaskError, match="names unicorn"):
        SegmentationMetrics(CLASSES, ["unicorn"])


def test_two_empty_masks_agree():
    nothing = np.zeros((4, 4), bool)
    assert binary_iou(nothing, nothing) == 1


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_a_boundary_is_what_is_near_the_outside(width):
    mask = np.random.default_rng(width).random((23, 31)) < 0.97
    expected = np.zeros_like(mask)
    framed = np.pad(mask, width)
    for y, x in np.argwhere(mask):
        expected[y, x] = not framed[y : y + 2 * width + 1, x : x + 2 * width + 1].all()
    assert np.array_equal(boundary(mask, width), expected)
    assert not boundary(np.zeros((4, 5), bool), width).any()


def test_boundaries_that_lie_in_what_is_ignored_do_not_count():
    labels, predicted = np.zeros((2, 1, 32, 64), np.uint8)
    labels[0, 8:24, 8:24] = 1  # nothing is predicted there
    labels[0, :, 32:], predicted[0, 8:24, 40:56] = 255, 1
    figures = counted(labels, predicted)
    assert figures["boundary_miou_3px_at_128"] == figures["miou"] == 0


def test_an_object_goes_on_as_predicted_in_what_is_ignored():
    labels, predicted = np.zeros((2, 1, 32, 64), np.uint8)
    labels[0, 8:24, 8:32] = predicted[0, 8:24, 8:56] = 1
    labels[0, :, 32:] = 255
    assert counted(labels, predicted)["boundary_miou_3px_at_128"] == 1
