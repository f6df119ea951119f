"""learning/affinity_net.py against pairs and transition matrices written out in full."""

import itertools
import math

import pytest
import torch
import transformers
from learning_samples import tiny_model

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.affinity_net import (
    EPS,
    AffinityLearner,
    affinity_loss,
    affinity_maps,
    cell_labels,
    load_affinity,
    new_affinity,
    offsets,
    walked,
)
from diffumask_fast.learning.segmenters import normalised

CLASSES = {0: "background", 7: "car", 12: "dog"}


def places(height: int, width: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(height), range(width)))


def near(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return math.dist(one, other) < 5


def test_neighbours_are_a_half_plane():
    half = list(offsets())
    assert len(half) == len(set(half)) == 34  # as in the paper's program
    both = {*half, *((-down, -right) for down, right in half)}
    disc = {place for place in itertools.product(range(-5, 6), repeat=2) if place != (0, 0) and near(place, (0, 0))}
    assert both == disc and len(both) == 68


@pytest.mark.parametrize("size", [(6, 9), (3, 3), (1, 7)], ids=str)
def test_the_loss_is_that_of_all_pairs(size):
    features, labels = torch.randn(2, 16, *size), torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (2, *size))]
    losses = {"background": [], "object": [], "other": []}
    for image in range(2):
        for one, other in itertools.combinations(places(*size), 2):
            a, b = labels[image][one].item(), labels[image][other].item()
            if not near(one, other) or 255 in (a, b):
                continue
            affinity = math.exp(-(features[image, :, *one] - features[image, :, *other]).abs().mean().item())
            kind = "other" if a != b else "object" if a else "background"
            losses[kind].append(-math.log((1 - affinity if kind == "other" else affinity) + EPS))
    mean = {kind: sum(some) / max(1, len(some)) for kind, some in losses.items()}
    expected = mean["background"] / 4 + mean["object"] / 4 + mean["other"] / 2
    assert affinity_loss(features, labels).item() == pytest.approx(expected, rel=1e-4) and expected > 0


def test_nothing_known_is_no_loss():
    features = torch.randn(1, 16, 4, 4, requires_grad=True)
    loss = affinity_loss(features, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()


def test_a_cell_has_the_label_of_most_of_its_pixels():
    labels = torch.full((1, 4, 8), 255)
    labels[0, :, :2], labels[0, :2, 4:], labels[0, 2:, 4:] = 1, 0, 2
    labels[0, 3, 2] = 1
    assert cell_labels(labels, 3, (2, 4)).tolist() == [[[1, 255, 0, 0], [1, 255, 2, 2]]]
    assert cell_labels(labels, 3, (1, 2)).tolist() == [[[1 if 9 / 16 > 0.5 else 255, 255]]]


@pytest.mark.parametrize("size", [(6, 8), (2, 3), (1, 1)], ids=str)
def test_the_walk_is_a_power_of_the_transition_matrix(size):
    features, maps = torch.randn(2, 16, *size), torch.rand(2, 3, *size)
    cells = places(*size)
    for image in range(2):
        matrix = torch.zeros(len(cells), len(cells), dtype=torch.float64)
        for (i, one), (j, other) in itertools.product(enumerate(cells), repeat=2):
            if near(one, other):
                gap = (features[image, :, *one] - features[image, :, *other]).abs().mean()
                matrix[i, j] = math.exp(-gap) ** 8
        matrix = matrix / matrix.sum(0)  # each column sums to 1
        expected = maps[image].flatten(1).double() @ torch.linalg.matrix_power(matrix, 16)
        found = walked(features, maps, beta=8, steps=16)[image].flatten(1)
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_walk_stays_where_cells_are_alike():
    features = torch.zeros(1, 16, 8, 8)
    features[..., 4:] = 3
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 3, 1] = 1
    found = walked(features, maps, beta=16, steps=256)
    assert found[..., 4:].max() < 1e-9 and found[..., :4].min() > 0.01
    assert torch.allclose(walked(features, torch.ones_like(maps), 16, 256), torch.ones_like(maps), atol=1e-4)


@pytest.mark.parametrize("family", ["segformer", "resnet"])
def test_a_backbone_of_transformers_is_the_start(family, tmp_path):
    if family == "segformer":
        start = transformers.SegformerModel.from_pretrained(tiny_model("segformer", tmp_path / "start"))
    else:
        config = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, layer_type="basic"
        )
        start = transformers.ResNetModel(config)
        start.save_pretrained(tmp_path / "start")
    learner = new_affinity(str(tmp_path / "start"), CLASSES, 64)
    weights = learner.model.backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.state_dict().items() if name in weights)
    pixels = normalised(torch.randint(0, 256, (2, 3, 40, 72)))
    assert learner.model(pixels).shape == (2, 64, 10, 18)
    loss = learner.loss(pixels, torch.randint(0, 3, (2, 40, 72)))
    loss.backward()
    assert loss.item() > 0 and all(part.grad is not None for part in learner.model.heads.parameters())


def test_what_was_saved_is_loaded(tmp_path):
    learner = new_affinity("tiny", CLASSES, 512)
    assert learner.model.config["cell"] == 8  # 64 cells
    learner.save(tmp_path / "net", {"steps": 3})
    net = load_affinity(tmp_path / "net", torch.device("cpu"))
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    maps = torch.rand(1, 2, 64, 96)
    expected = affinity_maps(learner.model.eval(), images, maps, 16, 4)
    assert expected.shape == (1, 2, 8, 12) and torch.equal(affinity_maps(net, images, maps, 16, 4), expected)
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "config.json",
        "model.safetensors",
        "segmenter.json",
    ]
    (tmp_path / "net" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(DiffuMaskError, match="model.safetensors is not as train wrote it"):
        load_affinity(tmp_path / "net", torch.device("cpu"))


def test_no_backbone_is_one_sentence(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(DiffuMaskError, match="is no backbone that can be loaded .*: give tiny"):
            new_affinity(name, CLASSES, 64)


def test_it_learns_colours():
    """Two halves of one colour each: after some steps affinity is high in a half and low between them."""
    torch.manual_seed(0)
    learner: AffinityLearner = new_affinity("tiny", CLASSES, 64)
    images, labels = torch.full((2, 3, 64, 64), 50), torch.zeros(2, 64, 64, dtype=torch.long)
    images[..., 32:] = torch.tensor([210, 60, 60])[:, None, None]
    labels[..., 32:] = 1
    adam = torch.optim.AdamW(learner.model.parameters(), lr=2e-3)
    for _ in range(8):
        loss = learner.loss(normalised(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., :32] = 1
    found = affinity_maps(learner.model.eval(), images[:1].permute(0, 2, 3, 1).byte(), maps, beta=16, steps=16)
    assert found[..., :8].mean() > 0.9 and found[..., 8:].mean() < 0.1
