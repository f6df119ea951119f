"""Segmenters: transformers' models behind one form. `tiny`, a small SegFormer, is ours to train from scratch."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.dataset.writer import explain, make_folder, write_file
from diffumask_fast.errors import DiffuMaskError, first_line
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.models.loading import quietly

logger = logging.getLogger(__name__)

RECORD = "segmenter.json"  # in a trained segmenter's folder, written last: classes, and how it was trained
PART = ".part"  # the folder in it that is there until the record is
FAMILIES = {
    "segformer": "SegformerForSemanticSegmentation",
    "upernet": "UperNetForSemanticSegmentation",
    "mask2former": "Mask2FormerForUniversalSegmentation",
    "eomt": "EomtForUniversalSegmentation",
}
IGNORED = {"segformer": "semantic_loss_ignore_index", "upernet": "loss_ignore_index"}
HEADS = ("classifier", "class_predictor")  # names of the layers that have a row for each label
BY_MASKS = ("mask2former", "eomt")  # they predict masks, and a class for each
TINY: dict[str, Any] = {
    "hidden_sizes": [32, 64, 96, 128], "num_attention_heads": [1, 2, 3, 4], "depths": [2, 2, 2, 2],
    "decoder_hidden_size": 128, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as all these models have them
STRIDE = 32  # sides that every family takes are multiples of it
PROBABILITIES = 2**27  # that are predicted together, 512 MB of them


class TransformersSegmenter:
    """A model of transformers that gives each pixel its class.

    Args:
        model: of one of the `FAMILIES`, with one label for each class.
        classes: id in masks -> name, background 0 included; in the order of the ids they are the model's labels.
    """

    def __init__(self, model: Any, classes: Mapping[int, str]) -> None:
        self.model, self.classes = model, dict(sorted(classes.items()))
        if model.config.num_labels != len(self.classes):
            raise DiffuMaskError(f"the model has {model.config.num_labels} labels for {len(self.classes)} classes")
        self.by_masks = model.config.model_type in BY_MASKS
        # EoMT's positions are those of one size of image.
        self.side: int | None = model.config.image_size if model.config.model_type == "eomt" else None

    @property
    def class_ids(self) -> dict[str, int]:
        """Name -> id in masks, without the background."""
        return {name: value for value, name in self.classes.items() if value}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the model's own training loss.

        Args:
            pixels: [B, 3, H, W] float, as `normalised` gives them.
            labels: [B, H, W] int64, 0 to C - 1, 255 ignored (for Mask2Former and EoMT: part of no mask); one pixel
                at least is not 255.
        """
        if self.model.config.model_type == "upernet" and len(pixels) == 1:
            raise DiffuMaskError("upernet takes statistics over images: give a `batch_size` of 2 or more")
        if self.side:
            pixels, labels = _resized(pixels, self.side), _nearest(labels, self.side)
        if not self.by_masks:
            return self.model(pixel_values=pixels, labels=labels).loss
        some = (labels != IGNORE).flatten(1).any(1)  # without any mask some versions of their loss fail
        pixels, labels = pixels[some], labels[some]
        present = [(values := part.unique())[values != IGNORE] for part in labels]
        masks = [(part == values[:, None, None]).float() for part, values in zip(labels, present, strict=True)]
        return self.model(pixel_values=pixels, mask_labels=masks, class_labels=present).loss

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> Tensor:
        """Return the probability of each class.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, C, H, W] float32 on the model's device, which sum to 1; C in the order of `classes`.
        """
        height, width = images.shape[1:3]
        pixels = normalised(torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2))
        if self.side:
            found = self._probabilities(_resized(pixels, self.side))
            return F.interpolate(found, (height, width), mode="bilinear", align_corners=False)
        pixels = F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        return self._probabilities(pixels)[..., :height, :width]

    def masks(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """Return predicted masks of class ids, uint8 [B, H, W], of images uint8 [B, H, W, 3]."""
        ids = np.array(list(self.classes), np.uint8)
        batch = max(1, min(batch, PROBABILITIES // (len(ids) * math.prod(images.shape[1:3]))))
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return np.concatenate([ids[self.predict(part).argmax(1).cpu().numpy()] for part in parts])

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write configuration and weights (safetensors) as transformers reads them; see `save_trained`."""
        save_trained(folder, self.model.save_pretrained, self.classes, record)

    def _probabilities(self, pixels: Tensor) -> Tensor:
        said, size = self.model(pixel_values=pixels), pixels.shape[-2:]
        if not self.by_masks:
            logits = F.interpolate(said.logits.float(), size, mode="bilinear", align_corners=False)
            return logits.softmax(1)
        classes = said.class_queries_logits.float().softmax(-1)[..., :-1]  # the last one is "no object"
        masks = F.interpolate(said.masks_queries_logits.float(), size, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", classes, masks)
        return scores / scores.sum(1, keepdim=True).clamp(min=1e-12)


def normalised(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] of values from 0 to 255 as the models take them, float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def new_segmenter(name: str, classes: Mapping[int, str], side: int) -> TransformersSegmenter:
    """Return a segmenter to train.

    Args:
        name: `tiny`; the name of a family, at transformers' default size, from scratch; or a folder or hub id of a
            model of one of the families, whose weights are the start. Heads of other classes begin anew.
        classes: id -> name, background 0 included.
        side: of the images it will see; EoMT from scratch is made for it.

    Raises:
        DiffuMaskError: there is no such model, or it is of no family that is known here.
    """
    import transformers

    labels = dict(enumerate(classes[value] for value in sorted(classes)))
    if len(labels) < 2:
        raise DiffuMaskError("there is no class to learn beside the background: name data with a class")
    if name == "tiny":
        config = transformers.SegformerConfig(**TINY, **_words(labels, "segformer"))
        model = transformers.SegformerForSemanticSegmentation(config)
    elif name in FAMILIES:
        kind = _family(name)
        size = {"image_size": side // 16 * 16} if name == "eomt" else {}
        with _needing_scipy(name):
            model = kind(kind.config_class(**_words(labels, name), **size))
    else:
        model = _pretrained(name, labels)
    return TransformersSegmenter(model, classes)


def load_segmenter(folder: str | Path, device: torch.device | str = "cpu") -> TransformersSegmenter:
    """Return a segmenter that `train` has written, ready to predict.

    Raises:
        DiffuMaskError: the folder holds none, or one that is damaged.
    """
    record = checked_record(folder)
    segmenter = TransformersSegmenter(
        _pretrained(str(folder)), {int(value): name for value, name in record["classes"].items()}
    )
    segmenter.model.to(device).eval().requires_grad_(False)
    return segmenter


def save_trained(
    folder: Path, write: Callable[[Path], Any], classes: Mapping[int, str], record: Mapping[str, Any]
) -> None:
    """Write the files of a trained model, and our record of them last.

    Args:
        folder: made if needed.
        write: writes the files into a folder.
        classes: id in masks -> name.
        record: what is known of the training, values that JSON can hold; the classes and the files' hashes are added.

    Raises:
        DiffuMaskError: it cannot be written.
    """
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    try:
        with quietly():
            write(part)
        files = {file.name: _sha256(file) for file in sorted(part.iterdir())}
        for name in files:
            os.replace(part / name, folder / name)
    except OSError as error:
        raise explain(error, folder) from error
    except SafetensorError as error:
        raise DiffuMaskError(f"cannot write in {folder}: {error}") from error
    known = {"classes": {str(value): name for value, name in classes.items()}, "files": files, **record}
    write_file(folder / RECORD, (json.dumps(known, indent=2) + "\n").encode())
    part.rmdir()


def checked_record(folder: str | Path) -> dict[str, Any]:
    """Return what `train` has written about a model whose files are as it wrote them.

    Raises:
        DiffuMaskError: as `read_record`, or a file is missing or was changed.
    """
    record = read_record(folder)
    for file, sha256 in record.get("files", {}).items():
        path = Path(folder) / file
        if not path.is_file() or _sha256(path) != sha256:
            raise DiffuMaskError(f"{path} is not as train wrote it: bring it back, or train the segmenter again")
    return record


def load_pretrained(folder: str | Path, device: torch.device | str = "cpu") -> TransformersSegmenter:
    """Return somebody else's segmenter, a folder of transformers, with the classes that its config.json names.

    Where the first of them is no background, ids are its labels' numbers plus 1, and no pixel is background.

    Raises:
        DiffuMaskError: the folder holds none, its weights are incomplete, or it has more classes than a mask can hold.
    """
    model = _pretrained(str(folder))
    labels = {int(number): str(name).strip() for number, name in model.config.id2label.items()}
    shift = int(labels.get(0, "").casefold() != "background")
    if len(labels) + shift > IGNORE:
        raise DiffuMaskError(
            f"{folder} has {len(labels)} classes, and a mask holds {IGNORE - 1}: use another segmenter"
        )
    segmenter = TransformersSegmenter(model, {number + shift: name for number, name in labels.items()})
    segmenter.model.to(device).eval().requires_grad_(False)
    return segmenter


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return what `train` has written about a segmenter.

    Raises:
        DiffuMaskError: there is no such file, or it is damaged.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
        if not all(isinstance(name, str) and int(value) < IGNORE for value, name in record["classes"].items()):
            raise ValueError("other classes than a segmenter's")
    except FileNotFoundError as error:
        raise DiffuMaskError(f"{folder} is no segmenter: name mini-oracle, or a folder that train wrote") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffuMaskError(f"{path} is damaged: train the segmenter again") from error
    return record


def _pretrained(name: str, labels: Mapping[int, str] | None = None) -> Any:
    """Load a model from a folder or the hub: safetensors alone, and no code of the repository's.

    Args:
        name: of the folder or of the repository.
        labels: those that the model is to have, 255 ignored; None leaves it as it is.
    """
    import transformers

    try:
        with quietly():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        family = config.model_type
        if family not in FAMILIES:
            raise DiffuMaskError(f"{name} is a {family} model: give tiny, or a model of {', '.join(FAMILIES)}")
        words: dict[str, Any] = {} if labels is None else _words(labels, family)
        with quietly(), _needing_scipy(family):
            model, report = _family(family).from_pretrained(
                name,
                ignore_mismatched_sizes=labels is not None,
                use_safetensors=True,
                output_loading_info=True,
                **words,
            )
        if labels is None and (missing := sorted(report["missing_keys"])):
            raise DiffuMaskError(f"{name} is no trained segmenter, for it lacks {missing[0]}: give another one")
        if labels is not None and config.id2label != labels:
            if (Path(name).expanduser() / RECORD).exists():
                logger.warning(
                    "%s has other classes than the data: its last layer, which tells them, begins anew", name
                )
            for part, layer in model.named_modules():
                if part.split(".")[-1] in HEADS:
                    layer.reset_parameters()
        return model
    except DiffuMaskError:
        raise
    except Exception as error:  # noqa: BLE001 - of the hub, of safetensors or of the configuration, by many names
        cause = first_line(error)[:200]
        raise DiffuMaskError(
            f"{name} is no segmenter that can be loaded ({cause}): give tiny, {', '.join(FAMILIES)}, a folder, "
            "or a hub id with a connection"
        ) from error


def _words(labels: Mapping[int, str], family: str) -> dict[str, Any]:
    """Return what a configuration says of the labels."""
    words: dict[str, Any] = {"id2label": dict(labels), "label2id": {label: value for value, label in labels.items()}}
    return words | ({IGNORED[family]: IGNORE} if family in IGNORED else {})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _family(name: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[name])


@contextmanager
def _needing_scipy(family: str) -> Iterator[None]:
    """Say which package a family lacks."""
    try:
        yield
    except ImportError as error:
        raise DiffuMaskError(f'{family} needs scipy: pip install "diffumask-fast[learn]"') from error


def _resized(pixels: Tensor, side: int) -> Tensor:
    return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)


def _nearest(labels: Tensor, side: int) -> Tensor:
    return F.interpolate(labels[:, None].float(), (side, side), mode="nearest-exact")[:, 0].long()
