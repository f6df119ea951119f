"""Find LoRA files, check and hash them, and fuse them into a model's weights."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError, first_line

logger = logging.getLogger("diffumask_fast")
USUAL = "pytorch_lora_weights.safetensors"  # what diffusers calls a LoRA's file
ALLOWED = "PATH_OR_HUB[:SCALE], with a finite number other than 0 as the scale"
ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./ -]+))?")
WITHIN_LAYER = re.compile(r"[._](?:lora|lokr|loha|hada|alpha|dora)")  # begins what follows a layer's name in a key


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of it a model gets.

    Args:
        name: of the file, or its place on the hub.
        path: of the file.
        scale: factor of what it adds to the weights.
        sha256: of its bytes.
    """

    name: str
    path: str
    scale: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}:{self.scale!r}"


def lora_record(loras: Sequence[Lora]) -> dict[str, Any]:
    """Return what is recorded of LoRA files, as JSON types; nothing where there are none."""
    if not loras:
        return {}
    return {"lora": [str(lora) for lora in loras], "lora_sha256": {lora.name: lora.sha256 for lora in loras}}


def lora_texts(value: Any) -> tuple[str, ...]:
    """Read one or several texts or paths PATH_OR_HUB[:SCALE]; a ValueError says what is allowed."""
    given = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | Path) for text in given):
        raise ValueError(ALLOWED)
    for text in map(str, given):
        source, scale = split_scale(text)
        if not source or scale == 0 or not math.isfinite(scale):
            raise ValueError(ALLOWED)
    return tuple(map(str, given))


def split_scale(text: str) -> tuple[str, float]:
    """Return the source and the scale of PATH_OR_HUB[:SCALE]; what follows the last colon is a scale if it is one."""
    source, colon, last = text.rpartition(":")
    try:
        return (source, float(last)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def absolute_text(text: str) -> str:
    """Return PATH_OR_HUB[:SCALE] so that it means the same in another working directory."""
    source, scale = split_scale(text)
    path = Path(source).expanduser()
    return f"{path.absolute()}:{scale!r}" if path.exists() else text  # the target of a link may have no suffix


def find_loras(texts: Sequence[str]) -> tuple[Lora, ...]:
    """Find, check and hash the files of some PATH_OR_HUB[:SCALE].

    Raises:
        DiffuMaskError: peft is missing, there is no such file, it is damaged or no safetensors, or two have one name.
    """
    if texts:
        _need_peft()
    found = tuple(_find(*split_scale(text)) for text in texts)
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffuMaskError(f"`lora` names {twice[0]} twice: give each file once, and each a name of its own")
    return found


def _find(source: str, scale: float) -> Lora:
    path = Path(source).expanduser()
    if path.is_dir():
        path /= _only_file(path, [one.name for one in path.iterdir() if one.is_file()])
    on_hub = None if path.is_file() or source.startswith((".", "/", "~")) else ON_HUB.fullmatch(source)
    name = path.name
    if on_hub:
        path, name = _download(source, on_hub["repo"], on_hub["file"])
    if not path.is_file():
        raise DiffuMaskError(f"there is no LoRA {source}: give `lora` a file, its folder, or a hub id (owner/name)")
    _check(path)
    with path.open("rb") as file:
        return Lora(name, str(path.absolute()), scale, hashlib.file_digest(file, "sha256").hexdigest())


def _only_file(folder: Path | str, names: Sequence[str]) -> str:
    """Return the name of the one LoRA among a folder's files."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if USUAL in files or len(files) == 1:
        return USUAL if USUAL in files else files[0]
    if not files:
        raise DiffuMaskError(f"{folder} has no file *.safetensors, and a LoRA is read from no other: convert it")
    raise DiffuMaskError(f"{folder} has {len(files)} files, such as {files[0]}: give `lora` the one that is meant")


def _download(source: str, repo: str, file: str | None) -> tuple[Path, str]:
    """Return the path of a file of the hub, and its place there."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        if file is None:
            file = _only_file(repo, list_repo_files(repo))
        if not file.endswith(".safetensors"):
            _refuse(Path(file))
        return Path(hf_hub_download(repo, file)), f"{repo}/{file}"
    except DiffuMaskError:
        raise
    except Exception as error:
        raise DiffuMaskError(
            f"{source} is neither a LoRA here nor could it be fetched from the hub ({first_line(error)[:200]}): check "
            "the name and the connection, or give `lora` a local file"
        ) from error


def _check(path: Path) -> None:
    """Refuse what is no file of safetensors, before anything reads it."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        _refuse(path)
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise DiffuMaskError(f"{path} is no whole file of safetensors ({first_line(error)}): fetch it again") from error


def _refuse(path: Path) -> None:
    raise DiffuMaskError(
        f"{path} is no file of safetensors: a LoRA in another form may be a pickle, which can run code and is never "
        "loaded; convert it"
    )


def fuse_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Add LoRA files to the weights of a diffusers pipeline; no layer is left that was not there before.

    Args:
        pipe: the pipeline.
        loras: what `find_loras` gave.

    Raises:
        DiffuMaskError: the pipeline takes no LoRA, or one does not fit it or changes nothing of it.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise DiffuMaskError(f"{type(pipe).__name__} takes no LoRA: leave out `lora`")
    names = [f"lora_{at}" for at in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _load(pipe, name, lora)
    try:
        with _unheard():
            pipe.set_adapters(names, [lora.scale for lora in loras])
            pipe.fuse_lora(adapter_names=names, safe_fusing=True)
            pipe.unload_lora_weights()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        told = ", ".join(lora.name for lora in loras)
        raise DiffuMaskError(
            f"diffusers cannot fuse {told} ({first_line(error)[:200]}): leave it out, or give a smaller scale"
        ) from error


def _need_peft() -> None:
    from diffusers.utils.constants import MIN_PEFT_VERSION, USE_PEFT_BACKEND

    cause = f"peft {MIN_PEFT_VERSION} or newer is not installed"
    if USE_PEFT_BACKEND:
        try:
            import peft  # noqa: F401, which may itself lack accelerate
        except ImportError as error:
            cause = first_line(error)
        else:
            return
    raise DiffuMaskError(f"`lora` needs peft ({cause}): pip install 'diffumask-fast[lora]'")


def _load(pipe: Any, name: str, lora: Lora) -> None:
    """Load one file as an adapter, and see that it fits."""
    from diffumask_fast.attention.families import denoising_model  # imports torch, and flags need this file's texts

    path = Path(lora.path)
    try:
        with _unheard():
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # each form of LoRA fails in its own way
        raise DiffuMaskError(
            f"the LoRA {lora.name} does not fit this model ({first_line(error)[:200]}): give one that was made for it"
        ) from error
    layers = list(_layers(pipe, name))
    if not any(layer.get_delta_weight(name).any() for layer in layers):
        raise DiffuMaskError(f"the LoRA {lora.name} changes nothing of this model: give one that was made for it")
    num = len(_named(path))
    if (left := num - len(layers)) <= 0:
        return
    if set(layers).isdisjoint(denoising_model(pipe).modules()):  # families share their text encoders
        raise DiffuMaskError(
            f"the LoRA {lora.name} fits this model's text encoder alone, and {left} of its {num} layers are of another "
            "model: give one that was made for it"
        )
    logger.warning(
        "%d of the %d layers of the LoRA %s are none of this model's, and are left out", left, num, lora.name
    )


@contextmanager
def _unheard() -> Iterator[None]:
    """Hide what diffusers logs beside the error that it raises, and peft's warnings."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)


def _layers(pipe: Any, name: str) -> Iterator[Any]:
    """Yield the layers that an adapter is in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in pipe.components.values():
        for layer in getattr(part, "modules", list)():
            if isinstance(layer, BaseTunerLayer):
                if any(name in getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names):
                    yield layer


def _named(path: Path) -> set[str]:
    """Return the names of layers in a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {WITHIN_LAYER.split(key, maxsplit=1)[0] for key in file.keys()}
