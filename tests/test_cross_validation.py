"""learning/cross_validation.py: nobody judges what it has seen, and cleanlab gets what it takes."""

import numpy as np
import pytest
import torch
from learning_samples import dataset, tiny_model

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.cross_validation import (
    CleanlabFile,
    Part,
    agreement,
    deal,
    held_out_predictions,
    train_folds,
)
from diffumask_fast.learning.data import Example, open_data
from diffumask_fast.learning.options import LearnOptions
from diffumask_fast.learning.segmenters import read_record
from diffumask_fast.learning.training import _digest


def test_folds_share_every_class():
    classes = [["dog"]] * 10 + [["car"]] * 5 + [["cat"]] * 3 + [[]]
    fold_of = deal(classes, 3, 0)
    for name in ("dog", "car", "cat"):
        sizes = np.bincount(fold_of[[name in names for names in classes]], minlength=3)
        assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
    assert np.bincount(fold_of).max() - np.bincount(fold_of).min() <= 1  # what is left over does not add up in one
    assert np.array_equal(fold_of, deal(classes, 3, 0)) and not np.array_equal(fold_of, deal(classes, 3, 1))


def test_a_class_beside_others_is_in_every_fold():
    for seed in range(20):
        classes = [["dog"]] * 12 + [["dog", "hat"]] * 3 + [["car", "dog"]] * 4
        fold_of = deal(classes, 3, seed)
        for name in ("dog", "hat", "car"):
            assert set(fold_of[[name in names for names in classes]]) == {0, 1, 2}


def test_a_class_that_a_fold_would_lack_is_one_sentence():
    with pytest.raises(DiffuMaskError, match="cat has 2 images for 3 folds, .* or give `folds=2`"):
        deal([["dog"]] * 5 + [["dog", "cat"]] * 2, 3, 0)
    # sky is the rarest of none of its images, and lies with others' in one fold under some seeds
    classes = [
        ["sky", "dog"],
        ["sky", "cat"],
        ["sky", "car"],
        *[["dog"]],
        *[["cat"]],
        *[["car"]],
        *[["sea", "sun"]] * 2,
    ]
    found = []
    for seed in range(60):
        try:
            fold_of = deal(classes, 2, seed)
            found.append(len(set(fold_of[:3])))
        except DiffuMaskError as error:
            assert "sky" in str(error) and "give another `seed`" in str(error)
    assert 0 < len(found) < 60 and set(found) == {2}


def certain(predicted: np.ndarray) -> np.ndarray:
    """Return the probabilities of a prediction that is sure of its classes 0, 7 and 12."""
    return np.stack([predicted == value for value in (0, 7, 12)]).astype(np.float32)


def agreed(labels: np.ndarray, probabilities: np.ndarray, value: int = 12) -> float:
    example = Example("a", np.zeros((*labels.shape, 3), np.uint8), labels)
    return agreement(example, probabilities, [0, 7, 12], value)


def test_agreement_of_sure_predictions():
    labels, predicted = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    labels[:2], predicted[1:3] = 12, 12
    half = 0.5**0.25  # half of the mask shows an object
    assert agreed(labels, certain(predicted)) == pytest.approx(4 / 12 * half)
    labels[0], predicted[0] = 255, 12
    assert agreed(labels, certain(predicted)) == pytest.approx(4 / 8)
    assert agreed(labels, certain(predicted), 7) == 0  # neither there nor predicted: the mask is empty
    assert agreed(np.full((4, 4), 255, np.uint8), certain(predicted)) == 0
    labels[2:], predicted[2:] = 7, 7  # another object is no part of it
    assert agreed(labels, certain(predicted)) == 1
    assert agreed(np.where(labels == 7, 12, labels), certain(predicted)) == pytest.approx(half)


def test_a_mask_whose_class_is_doubted_stands_between_a_right_one_and_a_wrong_one():
    whole, half = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    whole[:2], half[:1] = 12, 12
    doubted = np.zeros((3, 4, 4), np.float32)
    doubted[0, 2:], doubted[1, :2], doubted[2, :2] = 1, 0.6, 0.4
    assert agreed(whole, doubted) == pytest.approx((0.4 / 0.6) ** 0.25)
    assert agreed(half, doubted) == pytest.approx((0.4 / 0.6) ** 0.25 / 2)
    wrong = certain(np.where(whole, 7, 0))
    assert agreed(whole, wrong) == 0 and agreed(np.where(whole, 7, 0), wrong, 7) == 1


def test_a_right_mask_whose_object_is_half_seen_stands_above_half_a_mask_of_one_that_is_seen():
    whole, half = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    whole[:2], half[:1] = 12, 12
    seen, unsure = np.zeros((2, 3, 4, 4), np.float32)
    seen[0, 2:], seen[2, :2] = 1, 1
    unsure[0], unsure[2] = seen[0], seen[2]
    unsure[0, 1], unsure[2, 1] = 0.6, 0.4  # less probable than background, which is surer below
    assert agreed(whole, unsure) == pytest.approx(0.7**0.25) and agreed(half, seen) == pytest.approx(0.5)
    too_large = np.full((4, 4), 12, np.uint8)  # no pixel says how sure the segmenter is of background
    assert agreed(too_large, seen) == pytest.approx(0.5 * 0.5**0.25)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    data = open_data(dataset(folder / "data", num=12))
    learning = LearnOptions(segmenter=str(tiny_model("segformer", folder / "start")), steps=1, batch_size=2)
    fold_of = deal([["all"]] * len(data), 2, 0)
    return data, fold_of, train_folds(data, fold_of, folder / "out", learning, device="cpu"), folder / "out"


def test_each_segmenter_has_seen_the_other_folds_alone(folds):
    data, fold_of, segmenters, out = folds
    assert [path.name for path in sorted(out.iterdir())] == ["fold-0", "fold-1"]
    for fold in (0, 1):
        others = Part(data, np.flatnonzero(fold_of != fold).tolist())
        assert read_record(out / f"fold-{fold}")["plan"]["data"] == [_digest(others)]
    part = Part(data, [3, 1])
    assert part.names == [data.names[3], data.names[1]] and len(part) == 2 and part.classes == data.classes
    assert np.array_equal(part[0].labels, data[3].labels)
    for number, (example, probabilities) in enumerate(
        held_out_predictions(data, fold_of, segmenters, torch.device("cpu"))
    ):
        assert example.name == data.names[number]
        own = segmenters[fold_of[number]].predict(example.image[None])[0]
        other = segmenters[1 - fold_of[number]].predict(example.image[None])[0]
        assert torch.equal(probabilities, own) and not torch.equal(probabilities, other)


def test_what_cleanlab_takes(folds, tmp_path):
    data, fold_of, segmenters, _ = folds
    path = tmp_path / "issues.npz"
    for _ in range(2):  # the second time over our own file
        predictions = held_out_predictions(data, fold_of, segmenters, torch.device("cpu"))
        passed = list(CleanlabFile(path, data).write(predictions))
    with np.load(path, allow_pickle=False) as stored:
        labels, probabilities = stored["labels"], stored["pred_probs"]
        assert stored["classes"].tolist() == ["background", "car", "dog"] and stored["names"].tolist() == data.names
    assert labels.shape == (len(data), 24, 40) and probabilities.shape == (len(data), 3, 24, 40)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    for number, (example, predicted) in enumerate(passed):
        assert np.array_equal(probabilities[number], predicted.numpy())
        for label, value in enumerate(data.classes):
            assert (labels[number][example.labels == value] == label).all()
        unknown = example.labels == 255
        assert (labels[number][unknown] == predicted.argmax(0).numpy()[unknown]).all()


def test_another_file_or_size_is_one_sentence(folds, tmp_path):
    data, *_ = folds
    theirs = tmp_path / "theirs.npz"
    theirs.write_bytes(b"something")
    with pytest.raises(DiffuMaskError, match="was not written by this program"):
        CleanlabFile(theirs, data)
    with pytest.raises(DiffuMaskError, match="nowhere is no folder: make it"):
        CleanlabFile(tmp_path / "nowhere" / "b.npz", data)
    sizes = iter([(24, 40), (24, 41)])
    predictions = (
        (Example(f"a{width}", np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)), 0)
        for height, width in sizes
    )
    shaped = ((example, torch.full((3, *example.labels.shape), 1 / 3)) for example, _ in predictions)
    with pytest.raises(DiffuMaskError, match="a41 has another size"):
        list(CleanlabFile(tmp_path / "b.npz", data).write(shaped))
    assert not (tmp_path / "b.npz").exists()
