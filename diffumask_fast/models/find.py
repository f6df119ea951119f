"""Find a model and check its folder before anything is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.hashing import weight_hash

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor")


@dataclass(frozen=True)
class ModelInfo:
    """A model and its recommended settings, from its folder's `diffumask.json`; defaults where there is no such file.

    Args:
        name: as the user gave it.
        folder: of the model; None for a pipeline that was composed in Python.
        classes: names of the classes that it can draw; empty means any.
        scenes: phrase of a place -> the classes that belong there; None means the general list.
        num_inference_steps: recommended number of steps.
        guidance_scale: recommended guidance.
        mask: mask and map options that were measured best for it.
        scheduler: class name of the recommended scheduler; None means the folder's own.
    """

    name: str
    folder: Path | None = None
    classes: tuple[str, ...] = ()
    scenes: dict[str, tuple[str, ...]] | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    mask: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments of a call that suit the model best; none where its folder does not say, or has no say."""
        if self.scenes is None:
            return {}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    @cached_property
    def weights(self) -> str | None:
        """SHA-256 of the folder's weights and configuration; all are read at the first use."""
        return weight_hash(self.folder) if self.folder else None

    @property
    def local_folder(self) -> Path:
        """The folder; raises DiffuMaskError for a pipeline that was composed in Python, which has none."""
        if self.folder is None:
            raise DiffuMaskError(f"{self.name} was composed in Python and has no folder: load it from one.")
        return self.folder

    @property
    def identity(self) -> str:
        """The name that a dataset records: of a local folder the last part of its path, for `weights` identifies it."""
        return self.folder.name if self.folder and Path(self.name).expanduser().is_dir() else self.name


def find_model(model: str | Path, revision: str | None = None, held: Collection[str] = ()) -> ModelInfo:
    """Resolve "mini", a diffusers folder or a hub id to a checked local folder.

    Args:
        model: as the user gave it.
        revision: of a hub id.
        held: components whose weights an exported engine holds, so that the folder need not.

    Raises:
        DiffuMaskError: there is no such model, its folder is incomplete, or its weights are pickles only.
    """
    if str(model) == "mini":
        from diffumask_fast import mini

        folder = mini.folder()
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not str(model).startswith("."):
        folder = _download(str(model), revision)
    else:
        raise DiffuMaskError(
            f"There is no model folder {model}: give mini, a diffusers folder or a hub id (owner/name)."
        )
    check_folder(folder, held)
    return _read_info(str(model), folder)


def _download(model: str, revision: str | None) -> Path:
    try:
        return Path(DiffusionPipeline.download(model, revision=revision, use_safetensors=True))
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DiffuMaskError(
            f"{model} is neither a folder here nor could it be fetched from the hub as safetensors ({cause[:200]}): "
            "check the name and the connection, or give a local folder."
        ) from error


def check_folder(folder: Path, held: Collection[str] = ()) -> None:
    """Check that a diffusers folder is complete and holds safetensors.

    Raises:
        DiffuMaskError: a file is missing, cut off or a pickle; names the first one.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):
        raise DiffuMaskError(f"{folder} is not in UTF-8, and safetensors opens no other path: rename the folder.")
    index = folder / "model_index.json"
    if not index.is_file():
        raise DiffuMaskError(f"{folder} is no diffusers model: it has no model_index.json.")
    try:
        components = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise DiffuMaskError(f"{index} is not valid JSON: the folder is half-written, fetch it again.") from error
    if not isinstance(components, dict):
        raise DiffuMaskError(f"{index} is no index of a diffusers model: fetch the model again.")
    for name, value in components.items():
        empty = not isinstance(value, list) or not value or value[0] is None
        if name.startswith("_") or empty or name in held:
            continue
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            raise DiffuMaskError(f"{folder} is half-written: it names {name}, which is missing; fetch the model again.")
        if not name.startswith(WEIGHTLESS):
            _check_weights(part)


def _check_weights(part: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(part.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in sorted(part.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise DiffuMaskError(
                f"{part} has its weights only as a pickle ({pickles[0]}), which can run code and is never loaded: "
                "convert them to safetensors."
            )
        raise DiffuMaskError(f"{part} has no weights (*.safetensors): the folder is half-written, fetch it again.")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise DiffuMaskError(f"{path} is cut off or damaged ({error}): fetch the model again.") from error


def _read_info(name: str, folder: Path) -> ModelInfo:
    path = folder / "diffumask.json"
    if not path.exists():
        return ModelInfo(name, folder)
    try:
        known = json.loads(path.read_text("utf-8"))
        return ModelInfo(
            name, folder, tuple(known["classes"]), {k: tuple(v) for k, v in known["scenes"].items()},
            int(known["num_inference_steps"]), float(known["guidance_scale"]), dict(known.get("mask", {})),
            known.get("scheduler"),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffuMaskError(f"{path} is damaged ({error}): fetch the model again or delete that file.") from error
