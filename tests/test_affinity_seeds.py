"""learning/affinity_seeds.py: what is sure is labelled, the rest is ignored; the reference's fault is its own."""

import math

import numpy as np
import pytest
import torch
from learning_samples import dataset

from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.affinity_seeds import RULE, RULES, Rule, seed_labels, seed_levels, write_seeds

SIDE = 32


def disc(y: float, x: float, radius: float, side: int = SIDE) -> torch.Tensor:
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (((ys / side - y) ** 2 + (xs / side - x) ** 2) / radius**2).float()


def picture(*insides: torch.Tensor) -> torch.Tensor:
    image = torch.full((SIDE, SIDE, 3), 60, dtype=torch.uint8)
    for number, inside in enumerate(insides):
        image[inside] = torch.tensor([(220, 40, 40), (40, 40, 220)][number], dtype=torch.uint8)
    return image


def written_out(values: np.ndarray, rule: Rule) -> tuple[float, float]:
    """The rule as a list of steps."""
    edges = np.round(np.arange(rule.low, rule.high - 1e-9, 0.01), 2)
    counts = [((values >= edge) & (values < edge + 0.01)).sum() for edge in edges]
    threshold = edges[int(np.argmax(counts))]
    least = rule.least_area * values.size
    above = values[values > threshold].mean()
    while (values > above).sum() < least:
        if threshold < 0.30:
            break
        threshold -= 0.03
        above = values[values > threshold].mean()
    below = values[values < threshold].mean()
    while (values < below).sum() < least:
        if threshold > 0.75:
            break
        threshold += 0.03
        below = values[values < threshold].mean()
    return (
        values[values > threshold].mean() + rule.object_shift,
        values[values < threshold].mean() + rule.background_shift,
    )


@pytest.mark.parametrize("rule", [RULE, RULES["person"], RULES["diningtable"]], ids=["other", "person", "table"])
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("radius", [0.15, 0.3, 0.9])  # too little object, enough of both, too little background
def test_levels_are_those_of_the_rule_written_out(rule, radius):
    maps = torch.exp(-disc(0.4, 0.5, radius)) + 0.02 * torch.rand(
        SIDE, SIDE, generator=torch.Generator().manual_seed(1)
    )
    maps = (maps / maps.max() * 200).round() / 200 + 0.002  # no value on the edge of a bin
    assert seed_levels(maps, rule) == pytest.approx(written_out(maps.double().numpy().ravel(), rule), abs=1e-9)


def test_the_threshold_moves_where_there_is_too_little_of_one_side():
    small, large = (torch.exp(-disc(0.5, 0.5, radius)) for radius in (0.15, 0.9))
    still = RULE._replace(least_area=0.0)
    assert seed_levels(small, RULE)[0] < seed_levels(small, still)[0] - 0.1
    assert seed_levels(large, RULE)[1] > 0.6 and math.isnan(seed_levels(large, still)[1])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flat_map_has_no_seed_of_an_object(value):
    maps = torch.full((1, 1, 8, 8), value)
    labels = seed_labels(maps, picture()[None], torch.tensor([[12]]), [["dog"]])
    assert not (labels == 12).any()


def test_core_is_object_far_is_background_and_the_rest_is_ignored():
    shape = disc(0.5, 0.5, 0.3)
    labels = seed_labels(torch.exp(-shape)[None, None], picture(shape < 1)[None], torch.tensor([[12]]), [["dog"]])[0]
    assert set(labels.unique().tolist()) == {0, 12, 255}
    assert (labels[shape < 0.2] == 12).all() and (labels[shape > 4] == 0).all()
    assert (shape[labels == 12].max() < 1.2) and ((labels == 255) & (shape > 0.8)).any()


def test_each_class_has_its_own_seeds():
    left, right = disc(0.5, 0.25, 0.18), disc(0.5, 0.75, 0.18)
    maps = torch.stack([torch.exp(-left), torch.exp(-right)])[None]
    image = picture(left < 1, right < 1)[None]
    labels = seed_labels(maps, image, torch.tensor([[12, 7]]), [["dog", "car"]])[0]
    assert (labels[left < 0.1] == 12).all() and (labels[right < 0.1] == 7).all()
    both = seed_labels(
        maps.repeat(2, 1, 1, 1), image.repeat(2, 1, 1, 1), torch.tensor([[12, 7]] * 2), [["dog", "car"]] * 2
    )
    assert torch.equal(both[1], labels)  # a batch changes nothing


def test_the_references_fault_swaps_object_and_background_and_ignores_nothing():
    shape = disc(0.5, 0.5, 0.35)
    given = torch.exp(-shape)[None, None], picture(shape < 1)[None], torch.tensor([[12]]), [["dog"]]
    right, faulty = seed_labels(*given)[0], seed_labels(*given, faulty=True)[0]
    assert set(faulty.unique().tolist()) == {0, 12}
    assert (faulty[right == 0] == 12).all()
    inside = faulty == 0
    assert inside[shape < 0.1].all() and not inside[shape > 1.5].any()


def test_a_dataset_of_seeds_keeps_everything_but_the_masks(tmp_path):
    source = dataset(tmp_path / "in")
    write_seeds(source, tmp_path / "seeds", device=torch.device("cpu"))
    for before, after in zip(
        read_rows(source, accepted_only=False), read_rows(tmp_path / "seeds", accepted_only=False), strict=True
    ):
        assert all(np.array_equal(before.values[name], after.values[name]) for name in before.values if name != "mask")
        expected = seed_labels(
            torch.from_numpy(before.maps)[None],
            torch.from_numpy(before.image)[None],
            torch.tensor([before.class_ids]),
            [before.classes],
        )
        assert np.mean(after.mask == expected[0].numpy()) > 0.99  # rounding may differ in a batch
    with pytest.raises(DiffuMaskError, match="`reference_labels` was false and is true now"):
        write_seeds(source, tmp_path / "seeds", faulty=True, device=torch.device("cpu"))
