"""Find a model, check it before anything is drawn, and load it as a diffusers pipeline."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffumask_fast.errors import DiffuMaskError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor")


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder says of itself beside its weights (`diffumask.json`); defaults for folders that say nothing.

    Args:
        name: as the user gave it.
        folder: where it lies; None for a pipeline that was composed in Python.
        classes: class names that it can draw; empty when anything can be asked for.
        scenes: places that its prompts name, each with the classes that it suits; None for the general list.
        num_inference_steps: steps that suit it best.
        guidance_scale: guidance that suits it best.
        mask: mask options that were measured best for it.
    """

    name: str
    folder: Path | None = None
    classes: tuple[str, ...] = ()
    scenes: dict[str, tuple[str, ...]] | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    mask: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> str | None:
        """SHA-256 of the folder's weights and configuration, which are read when this is first asked for."""
        return weight_hash(self.folder) if self.folder else None

    @property
    def identity(self) -> str:
        """The name that a dataset records: a folder's own name, wherever it lies; the hash of its weights decides."""
        return self.folder.name if self.folder and Path(self.name).expanduser().is_dir() else self.name


def find_model(model: str | Path, revision: str | None = None, held: Collection[str] = ()) -> ModelInfo:
    """Resolve "mini", a diffusers folder or a hub id to a checked local folder.

    Args:
        model: as the user gave it.
        revision: of a hub id.
        held: components whose weights an exported engine holds, so that the folder need not.

    Raises:
        DiffuMaskError: no such model, a half-written folder, or weights that exist only as pickles.
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
    """Check that a diffusers folder is whole and holds safetensors.

    Raises:
        DiffuMaskError: naming the first file that is missing, cut off, or a pickle.
    """
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
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffuMaskError(f"{path} is damaged ({error}): fetch the model again or delete that file.") from error


def cache_folder() -> Path:
    """Return where this user's caches are kept: $XDG_CACHE_HOME/diffumask-fast, or ~/.cache/diffumask-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffumask-fast"


def weight_hash(folder: Path) -> str:
    """Return the SHA-256 of all weight and configuration files of a model folder, names included."""
    return combined_hash(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight and configuration file of a model folder, under its path in the folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def combined_hash(hashes: dict[str, str]) -> str:
    """Return one SHA-256 of what file_hashes gives."""
    digest = hashlib.sha256()
    for name in sorted(hashes, key=Path):
        digest.update(name.encode() + b"\0" + bytes.fromhex(hashes[name]))
    return digest.hexdigest()


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device: what was asked for, else CUDA where there is one, else the CPU.

    Raises:
        DiffuMaskError: CUDA was asked for and there is none.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise DiffuMaskError(f"There is no device {device}: use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise DiffuMaskError(f"Device {device} is not supported: use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DiffuMaskError(
            f"There is no CUDA device {device} here (torch sees {torch.cuda.device_count()}): use `device=cpu`."
        )
    return device


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the dtype: what was asked for, else fp16 on CUDA and fp32 on the CPU."""
    if dtype in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise DiffuMaskError(f"There is no dtype {dtype}: use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def says_force_upcast(folder: Path) -> bool:
    """Tell whether the folder's VAE says that it overflows in fp16; diffusers fills in True where it is silent."""
    path = folder / "vae" / "config.json"
    return bool(path.is_file() and json.loads(path.read_text("utf-8")).get("force_upcast", False))


def load_pipe(info: ModelInfo, dtype: torch.dtype, device: torch.device, **components: Any) -> DiffusionPipeline:
    """Load a checked folder as the diffusers pipeline that it names, quietly and from safetensors alone.

    Args:
        info: of the folder.
        dtype: of the weights.
        device: where the pipeline is to be.
        components: what stands for those of the folder.

    Raises:
        DiffuMaskError: diffusers cannot load it, or it has no UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    try:
        with quietly():
            pipe = DiffusionPipeline.from_pretrained(
                info.folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **components
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DiffuMaskError(f"diffusers cannot load {info.folder}: {cause}") from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel):
        raise DiffuMaskError(f"{info.name} has no UNet2DConditionModel: use a Stable Diffusion 1.x, 2.x or XL model.")
    return pipe.to(device)


@contextmanager
def without_bars(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hide a pipeline's own progress bars."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**config | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide loading bars and advice of diffusers and transformers; errors are raised all the same."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    try:
        for module, _ in levels:
            module.set_verbosity_error()
            module.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
            module.enable_progress_bar()


def _short(scheduler: type) -> str:
    """Return "ddim" for DDIMScheduler, "euler" for EulerDiscreteScheduler, "dpmsolver" for the multistep solver."""
    return re.sub("(Discrete|Multistep)?Scheduler$", "", scheduler.__name__).lower()


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Replace the pipeline's scheduler by the named one ("DDIMScheduler", or in short "ddim"), same noise schedule.

    Raises:
        DiffuMaskError: diffusers knows no such scheduler for this model; lists those there are.
    """
    compatible = {_short(cls): cls for cls in pipe.scheduler.compatibles}
    wanted = next((cls for cls in compatible.values() if cls.__name__ == name), compatible.get(name.lower()))
    if wanted is None:
        raise DiffuMaskError(
            f"There is no scheduler {name} for this model: use one of {', '.join(sorted(compatible))}."
        )
    config = dict(pipe.scheduler.config)
    if "clip_sample" in inspect.signature(wanted.__init__).parameters:
        config.setdefault("clip_sample", False)  # latents are not pixels: DDIM's default would clip them to -1..1
    pipe.scheduler = wanted.from_config(config)


def check_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> None:
    """Refuse a size that the VAE cannot make.

    Raises:
        DiffuMaskError: height or width is no positive multiple of the VAE's factor.
    """
    factor = pipe.vae_scale_factor
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value <= 0 or value % factor):
            raise DiffuMaskError(
                f"{name} {value} is not a multiple of {factor}: use {max(1, round(value / factor)) * factor}."
            )
