"""AffinityNet (Ahn and Kwak, CVPR 2018): features that are alike where two cells belong to one object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from diffumask_fast.errors import DiffuMaskError, first_line
from diffumask_fast.learning.segmenters import STRIDE, TINY, checked_record, normalised, save_trained
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.models.loading import quietly

RADIUS = 5  # two cells are a pair where they are nearer than this
WIDTHS = 32, 64  # features of each stage of the backbone, and of a cell
CELL = 4  # pixels of the side of a cell, of the finest features of common backbones
MOST_CELLS = 64  # along a side of the images that a net learns from
EPS = 1e-5
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class AffinityNet(nn.Module):
    """A backbone, and heads that make features of one size of its stages.

    Args:
        config: `backbone`, a configuration of transformers as a dictionary; `cell`, pixels of the side of a cell.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.backbone = _backbone(self.config["backbone"])
        widths = _widths(self.backbone)
        self.heads = nn.ModuleList(nn.Conv2d(width, WIDTHS[0], 1) for width in widths)
        self.last = nn.Conv2d(WIDTHS[0] * len(widths), WIDTHS[1], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, C, H / cell, W / cell], rounded up, of images [B, 3, H, W] as `normalised` gives them."""
        cell = self.config["cell"]
        size = [-(-side // cell) for side in pixels.shape[-2:]]
        padded = F.pad(pixels, (0, -pixels.shape[3] % STRIDE, 0, -pixels.shape[2] % STRIDE), mode="replicate")
        reach = [-(-side // cell) for side in padded.shape[-2:]]
        parts = [
            _resized(F.elu(head(stage)), reach)
            for head, stage in zip(self.heads, _stages(self.backbone, padded), strict=True)
        ]
        return F.elu(self.last(torch.cat(parts, 1)))[..., : size[0], : size[1]]


class AffinityLearner:
    """AffinityNet as the training loop takes it.

    Args:
        model: the net.
        classes: id in masks -> name, background 0 included.
    """

    def __init__(self, model: AffinityNet, classes: Mapping[int, str]) -> None:
        self.model, self.classes = model, dict(sorted(classes.items()))

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of images [B, 3, H, W] as `normalised` gives them and labels [B, H, W], 255 ignored."""
        features = self.model(pixels).float()
        return affinity_loss(features, cell_labels(labels, len(self.classes), features.shape[-2:]))

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write configuration and weights (safetensors); see `save_trained`."""
        save_trained(folder, self._write, self.classes, record)

    def _write(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(self.model.config, indent=2) + "\n")
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights))


def new_affinity(name: str, classes: Mapping[int, str], side: int) -> AffinityLearner:
    """Return an AffinityNet to train.

    Args:
        name: `tiny`, a small SegFormer's encoder from scratch; or a folder or hub id of a backbone that transformers
            loads, whose weights are the start.
        classes: id -> name, background 0 included.
        side: of the images that it will see; it sets the size of a cell.

    Raises:
        DiffuMaskError: there is no such backbone.
    """
    import transformers

    cell = CELL * max(1, round(side / (CELL * MOST_CELLS)))
    if name == "tiny":
        kept = {key: value for key, value in TINY.items() if key != "decoder_hidden_size"}
        config = transformers.SegformerConfig(**kept)
        return AffinityLearner(AffinityNet({"backbone": config.to_diff_dict(), "cell": cell}), classes)
    try:
        with quietly():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            if config.model_type == "segformer":
                start = transformers.SegformerModel.from_pretrained(name, use_safetensors=True)
            else:
                config.out_indices = list(range(1, len(config.stage_names)))
                kind = type(transformers.AutoBackbone.from_config(config))
                start = kind.from_pretrained(name, config=config, use_safetensors=True)
    except Exception as error:  # noqa: BLE001 - of the hub, of safetensors or of the configuration, by many names
        cause = first_line(error)[:200]
        raise DiffuMaskError(
            f"{name} is no backbone that can be loaded ({cause}): give tiny, or a folder or hub id of "
            "a SegFormer or of another backbone of transformers"
        ) from error
    net = AffinityNet({"backbone": start.config.to_diff_dict(), "cell": cell})
    net.backbone.load_state_dict(start.state_dict())
    return AffinityLearner(net, classes)


def load_affinity(folder: Path, device: torch.device) -> AffinityNet:
    """Return a trained net.

    Raises:
        DiffuMaskError: the folder holds none, or one that is damaged.
    """
    checked_record(folder)
    try:
        net = AffinityNet(json.loads((folder / CONFIG).read_text("utf-8")))
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DiffuMaskError(f"{folder} holds no AffinityNet: remove it, and it is trained again") from error
    return net.to(device).eval().requires_grad_(False)


def offsets() -> Iterator[tuple[int, int]]:
    """Yield (down, right) of the neighbours of a cell in one half plane: the other half has the same pairs."""
    for down in range(RADIUS):
        for right in range(-RADIUS + 1 if down else 1, RADIUS):
            if down * down + right * right < RADIUS * RADIUS:
                yield down, right


def affinities(features: Tensor) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], Tensor]]:
    """Yield, for each of the `offsets`, where pairs of cells begin, where they end, and their affinity, 0 to 1.

    Args:
        features: [B, C, h, w].
    """
    height, width = features.shape[-2:]
    for down, right in offsets():
        if down < height and abs(right) < width:
            here = slice(0, height - down), slice(max(0, -right), width - max(0, right))
            there = slice(down, height), slice(max(0, right), width - max(0, -right))
            yield here, there, torch.exp(-(features[(..., *here)] - features[(..., *there)]).abs().mean(1))


def affinity_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of psa: pairs in the background, in one object, and in different ones, as 1 : 1 : 2.

    Args:
        features: [B, C, h, w].
        labels: [B, h, w], 0 background, 255 ignored.
    """
    sums = features.new_zeros(3)
    counts = features.new_zeros(3)
    for here, there, affinity in affinities(features):
        first, second = labels[(..., *here)], labels[(..., *there)]
        known, same = (first != IGNORE) & (second != IGNORE), first == second
        kinds = torch.stack([known & same & (first == 0), known & same & (first > 0), known & ~same]).float()
        near, far = -torch.log(affinity + EPS), -torch.log(1 + EPS - affinity)
        sums = sums + (kinds * torch.stack([near, near, far])).sum((1, 2, 3))
        counts = counts + kinds.sum((1, 2, 3))
    return (sums / counts.clamp(min=1) * sums.new_tensor([0.25, 0.25, 0.5])).sum()


def cell_labels(labels: Tensor, num_labels: int, size: Sequence[int]) -> Tensor:
    """Return the label of each cell [B, h, w]: the one that most of its pixels bear, 255 where there is none."""
    known = torch.where(labels == IGNORE, num_labels, labels)
    shares = F.adaptive_avg_pool2d(F.one_hot(known, num_labels + 1).movedim(-1, 1).float(), (size[0], size[1]))
    most, label = shares[:, :num_labels].max(1)
    return torch.where(most > 0.5, label, IGNORE)


def walked(features: Tensor, maps: Tensor, beta: float, steps: int) -> Tensor:
    """Let maps walk at random between cells that are alike: each step a cell takes the mean of its neighbours.

    The transition matrix of the steps is never made: only the affinities of the 69 neighbours of each cell are kept.

    Args:
        features: [B, C, h, w].
        maps: [B, K, h, w].
        beta: power that affinities are raised to.
        steps: of the walk.

    Returns:
        [B, K, h, w], within the range of the maps.
    """
    size_b, _, height, width = features.shape
    number = torch.arange(height * width, device=features.device).view(height, width)
    weights, places = [torch.ones_like(features[:, 0])], [number]
    for here, there, affinity in affinities(features):
        for end, other in ((here, there), (there, here)):
            weight, place = torch.zeros_like(features[:, 0]), number.clone()
            weight[(..., *end)] = affinity**beta
            place[end] = number[other]
            weights.append(weight)
            places.append(place)
    weight = torch.stack(weights, 1).flatten(2)  # [B, 69, N]
    weight = (weight / weight.sum(1, keepdim=True))[:, None]
    index = torch.stack(places).flatten(1)  # [69, N]
    values = maps.flatten(2)
    for _ in range(steps):
        values = (values[..., index] * weight).sum(2)
    return values.view(size_b, -1, height, width)


@torch.inference_mode()
def affinity_maps(net: AffinityNet, images: Tensor, maps: Tensor, beta: float, steps: int) -> Tensor:
    """Return what the random walk makes of maps [B, K, H, W] of images [B, H, W, 3] uint8: [B, K, h, w]."""
    features = net(normalised(images.permute(0, 3, 1, 2))).float()
    return walked(features, F.adaptive_avg_pool2d(maps, features.shape[-2:]), beta, steps)


def _backbone(config: Mapping[str, Any]) -> Any:
    import transformers

    words = {key: value for key, value in config.items() if key != "model_type"}
    made: Any = transformers.AutoConfig.for_model(config["model_type"], **words)
    return (
        transformers.SegformerModel(made)
        if made.model_type == "segformer"
        else transformers.AutoBackbone.from_config(made)
    )


def _widths(backbone: Any) -> list[int]:
    config = backbone.config
    return list(config.hidden_sizes if config.model_type == "segformer" else backbone.channels)


def _stages(backbone: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return the features of each stage, [B, C, h, w], the finest first."""
    if backbone.config.model_type == "segformer":
        return backbone(pixels, output_hidden_states=True).hidden_states
    return backbone(pixels).feature_maps


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    if values.shape[2] > size[0]:
        return F.adaptive_avg_pool2d(values, (size[0], size[1]))
    return F.interpolate(values, (size[0], size[1]), mode="bilinear", align_corners=False)
