"""Find a model and check its folder before anything is drawn."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.errors import DiffuMaskError, first_line, in_one_line
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.hashing import OWN_OPTIONS, weight_hash
from diffumask_fast.models.lora import Lora, lora_record
from diffumask_fast.options import Options, checked, closed, number, whole

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MEASURED = ("mask", "few_steps")  # what calibrate writes
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
        origin: where these two are from, after "as"; "" where nobody has looked yet.
        doubt: what speaks against them, a clause; "" for nothing.
        mask: options of masks and of maps that were measured best for it, by name.
        few_steps: number of steps -> options that are better for runs of at most so many; the smallest such number
            counts.
        scheduler: class name of the recommended scheduler; None means the folder's own.
        loras: files that are fused into its weights.
    """

    name: str
    folder: Path | None = None
    classes: tuple[str, ...] = ()
    scenes: dict[str, tuple[str, ...]] | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    origin: str = ""
    doubt: str = ""
    mask: dict[str, Any] = field(default_factory=dict)
    few_steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    scheduler: str | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments of a call that suit the model best; none where its folder does not say, or has no say."""
        if self.scenes is None:
            return {}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    def best_options(self, steps: int | None = None) -> dict[str, Any]:
        """Return the options that were measured best for runs of so many steps, by name; None is as many as usual."""
        at_most = [most for most in self.few_steps if steps is not None and steps <= most]
        return {**self.mask, **(self.few_steps[min(at_most)] if at_most else {})}

    def map_options(self, maps: MapOptions | None = None, steps: int | None = None) -> MapOptions:
        """Return the options with "auto" resolved to what was measured best for the model and so many steps."""
        maps = maps or MapOptions()
        own = {name: value for name, value in self.best_options(steps).items() if value != "auto"}
        best = {"aggregation": "paper", "propagate": 1, **own}
        return replace(maps, **{name: best[name] for name, value in vars(maps).items() if value == "auto"})

    def mask_options(self, mask: MaskOptions | None = None, steps: int | None = None) -> MaskOptions:
        """Return the options; those that are None, all where none are given, are what was measured best."""
        best = self.best_options(steps)
        own = MaskOptions(**{name: value for name, value in best.items() if name in _names(MaskOptions)})
        return own if mask is None else closed(mask, own)

    @property
    def lora_record(self) -> dict[str, Any]:
        """What is recorded of its LoRA files."""
        return lora_record(self.loras)

    @cached_property
    def weights(self) -> str | None:
        """SHA-256 of the folder's weights and configuration, LoRA files apart; all are read at the first use."""
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
    elif Path(model).expanduser().is_file():
        raise DiffuMaskError(
            f"{model} is a file and no model folder: make one of it by diffusers' "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
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
        cause = first_line(error)[:200]
        raise DiffuMaskError(
            f"{model} is neither a folder here nor could it be fetched from the hub as safetensors ({cause}): "
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


def with_options(info: ModelInfo, path: str | Path | None, weights: str | None = None) -> ModelInfo:
    """Return a model's settings with the options of maps and masks that are in a file, where one is given.

    Args:
        info: of the model.
        path: of the file.
        weights: the model's hash where an engine holds its weights; None takes the folder's.

    Raises:
        DiffuMaskError: there is no such file, it holds none or others, or it was calibrated for another model.
    """
    if path is None:
        return info
    path = Path(path).expanduser()
    if not path.is_file():
        raise DiffuMaskError(f"there is no file {path}: give `model_options` what calibrate wrote")
    with _reading(path, "give `model_options` what calibrate wrote"):
        known = _named(json.loads(path.read_text("utf-8")))
        if not known.keys() & set(MEASURED):
            raise ValueError(f"it has no {' or '.join(MEASURED)}")
        made = replace(info, **_measured(known))
    _check_is_of(info, path, known.get("calibration"), weights)
    return made


def _check_is_of(info: ModelInfo, path: Path, calibration: Any, weights: str | None) -> None:
    """Raise where a file's options were found for another model; warn where it does not say for which one.

    A file without a calibration is somebody's own: that person says for which model it is.
    """
    if calibration is None:
        return
    drawn_by = calibration.get("images_drawn_by") if isinstance(calibration, dict) else None
    found_for = drawn_by if isinstance(drawn_by, dict) else {}
    if not isinstance(found_for.get("weights"), str):
        logger.warning("%s does not say for which model its options were found: whether they suit is not known", path)
    elif found_for["weights"] != (weights or info.weights):
        raise DiffuMaskError(
            f"{path} was calibrated for {str(found_for.get('model'))[:80]}, and the weights of {info.name} are others: "
            "name another file, or remove `calibration` from it to use its options all the same"
        )


def own_options(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of maps and masks by name, each checked.

    Raises:
        ValueError: there is no such option.
        DiffuMaskError: a value is not allowed.
    """
    kept: dict[str, Any] = {}
    for kind in (MapOptions, MaskOptions):
        given = {name: value for name, value in named.items() if name in _names(kind)}
        kept |= {name: getattr(kind(**given), name) for name in given}
    if not isinstance(kept.get("fill_holes", False), bool):
        raise ValueError(f"fill_holes is {kept['fill_holes']!r}, neither true nor false")
    if unknown := named.keys() - kept.keys():
        raise ValueError(f"{min(unknown)} is no option of maps or masks here")
    return kept


def _measured(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `mask` and `few_steps` of a file of options, each checked."""
    given = [
        (checked("few_steps", most, whole(1, 1000)), own_options(_named(named)))
        for most, named in _named(known.get("few_steps", {})).items()
    ]
    if len(few := dict(given)) < len(given):
        raise ValueError("few_steps has one number of steps twice")
    return {"mask": own_options(_named(known.get("mask", {}))), "few_steps": few}


def _read_info(name: str, folder: Path) -> ModelInfo:
    path = folder / OWN_OPTIONS
    if not path.exists():
        return ModelInfo(name, folder)
    with _reading(path, "fetch the model again or delete that file"):
        known = _named(json.loads(path.read_text("utf-8")))
        measured = _measured(known)
        if "classes" not in known and any(measured.values()):  # calibrate wrote it beside a model without such a file
            return ModelInfo(name, folder, **measured)
        classes = _texts(known["classes"])
        steps = checked("num_inference_steps", known["num_inference_steps"], whole(1, 1000))
        guidance = checked("guidance_scale", known["guidance_scale"], number())
        scenes = {scene: _texts(names) for scene, names in _named(known["scenes"]).items()}
        scheduler = known.get("scheduler")
        if not isinstance(scheduler, str | None):
            raise ValueError(f"scheduler is {scheduler!r}, no name")
        origin = f"{OWN_OPTIONS} says"
        return ModelInfo(name, folder, classes, scenes, steps, guidance, origin, scheduler=scheduler, **measured)


def _named(value: Any) -> dict[str, Any]:
    """Return a JSON object, which has values by name."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no JSON object")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts of JSON, which is no text itself."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{value!r} is no list of texts")
    return tuple(value)


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RecursionError, DiffuMaskError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise DiffuMaskError(f"{path} is damaged ({why}): {advice}.") from error


def _names(kind: type[Options]) -> set[str]:
    return {one.name for one in fields(kind)}
