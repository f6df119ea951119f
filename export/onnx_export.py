"""Write a diffusers model as ONNX, and check it against torch."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffumask_fast.attention.families import check_runs
from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.unet import UNetWithMaps, attention_places
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.check import check_part
from diffumask_fast.export.graphs import (
    OPSET,
    Exportable,
    exportable_decoder,
    exportable_text_encoder,
    exportable_unet,
    unet_factor,
    write_graph,
)
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import Manifest, Part, hash_files, versions, write_manifest
from diffumask_fast.export.options import ShapeOptions
from diffumask_fast.export.session import extra
from diffumask_fast.models.device import DTYPES
from diffumask_fast.models.find import ModelInfo, find_model
from diffumask_fast.models.hashing import file_hashes
from diffumask_fast.models.loading import load_pipe, says_force_upcast

EXTERNAL_BYTES = 2**29


def export_onnx(
    model: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    shapes: ShapeOptions | None = None,
    *,
    revision: str | None = None,
    external_bytes: int = EXTERNAL_BYTES,
    progress: Callable[[str], Any] = lambda _: None,
) -> Manifest:
    """Write UNet with maps, text encoders and VAE decoder as ONNX graphs, and check each against torch.

    Args:
        model: "mini", a diffusers folder or a hub id.
        out: folder of the engine; must not be there yet.
        dtype: "fp32", "fp16" or "bf16"; a VAE that overflows in fp16 stays in fp32.
        shapes: batch sizes, image sizes and phrases that the graphs take.
        revision: of a hub id.
        external_bytes: larger weights of a graph go into a file beside it.
        progress: is called with a sentence before each step.

    Returns:
        what was written, with the figures of the check.

    Raises:
        DiffuMaskError: a library is missing, out exists, the model or the shapes cannot be exported, or a graph does
            not agree with torch; nothing is left then.
    """
    need_exporter()
    out = Path(out).expanduser()
    if dtype not in DTYPES:
        raise DiffuMaskError(f"There is no dtype {dtype}: use {', '.join(DTYPES)}.")
    check_out(out)
    info = find_model(model, revision)
    pipe = load_pipe(info, torch.float32, torch.device("cpu"))
    check_runs(pipe, "onnx")
    if getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise DiffuMaskError(
            f"The UNet of {model} takes the guidance scale as an input (LCM), which no graph does: use `engine=torch`."
        )
    limits = find_limits(pipe, shapes or ShapeOptions())
    with staged(out) as folder, torch.random.fork_rng(devices=[]):
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        return _write(pipe, info, folder, dtype, limits, external_bytes, progress)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield the name of a folder to write in: it is renamed to `out` on success, and removed after an exception.

    Raises:
        DiffuMaskError: out exists, or cannot be written.
    """
    check_out(out)
    folder = out.parent / f".{out.name}.part"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
        os.replace(folder, out)
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {out} ({error.strerror or error}): choose another folder.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_limits(pipe: Any, shapes: ShapeOptions) -> Limits:
    """Return the limits of an engine for the shapes.

    Raises:
        DiffuMaskError: the model cannot draw these sizes.
    """
    unet, vae_factor = pipe.unet, pipe.vae_scale_factor
    multiple = unet_factor(unet) * vae_factor
    least, most = _sizes(unet, vae_factor, shapes)
    if any(size < multiple or size % multiple for size in (*least, *most)):
        raise DiffuMaskError(f"Sizes must be multiples of {multiple} for this model, unlike {least} to {most}.")
    if any(a > b for a, b in zip(least, most, strict=True)) or (shapes.static and least != most):
        low, high = ("x".join(map(str, size)) for size in (least, most))
        raise DiffuMaskError(
            f"`min_size={low}` and `max_size={high}` do not go together: give a larger `max_size`, or leave it out."
        )
    divisors = level_divisors(unet)
    pixels = {key: least[0] * least[1] // (vae_factor * divisor) ** 2 for key, divisor in divisors.items()}
    propagated = tuple(key for key, num in pixels.items() if shapes.propagate and num <= MAX_PROPAGATED_PIXELS)
    rows = 2 * shapes.max_batch
    return Limits(
        rows=(rows if shapes.static else 1, rows), height=(least[0], most[0]), width=(least[1], most[1]),
        multiple=multiple, vae_factor=vae_factor, channels=unet.config.out_channels,
        tokens=_tokens(pipe), max_phrases=shapes.max_phrases, divisors=divisors, propagated=propagated,
    )  # fmt: skip


def _sizes(unet: Any, vae_factor: int, shapes: ShapeOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the least and the most height and width, those left out filled in."""
    own = unet.config.sample_size
    height, width = own if isinstance(own, (list, tuple)) else (own, own)
    least = shapes.min_size or (height * vae_factor, width * vae_factor)
    return least, shapes.max_size or (least if shapes.static else (2 * least[0], 2 * least[1]))


def _tokens(pipe: Any) -> int:
    # SDXL's refiner has only the second tokenizer and text encoder.
    tokenizer, encoder = pipe.tokenizer or pipe.tokenizer_2, pipe.text_encoder or pipe.text_encoder_2
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def level_divisors(unet: Any) -> dict[str, int]:
    """Return level -> the factor by which its maps are smaller than the latents."""
    depths: dict[str, int] = {}
    depth, places = 0, attention_places(unet)
    for block in unet.down_blocks:
        for module in block.modules():
            if module in places:
                depths[places[module].level] = 2**depth
        depth += bool(getattr(block, "downsamplers", None))
    for module in unet.mid_block.modules() if unet.mid_block is not None else ():
        if module in places:
            depths[places[module].level] = 2**depth
    return dict(sorted(depths.items(), key=lambda entry: int(entry[0])))


def _write(
    pipe: Any, info: ModelInfo, folder: Path, dtype: str, limits: Limits, external_bytes: int, progress: Any
) -> Manifest:
    parts: dict[str, Part] = {}
    checked: dict[str, Any] = {}
    for name, module in _exported_components(pipe).items():
        part_dtype = "fp32" if name == "vae" and dtype == "fp16" and _overflows(pipe, info) else dtype
        progress(f"exporting {name} in {part_dtype}")
        part = _exportable(name, nn.Module.to(copy.deepcopy(module), DTYPES[part_dtype]), limits, pipe)
        write_graph(part, folder / f"{name}.onnx", external_bytes)
        (folder / f"{name}.json").write_text(_config(module), "utf-8")
        library = type(module).__module__.split(".")[0]
        parts[name] = Part(f"{name}.onnx", f"{name}.json", library, type(module).__name__, part_dtype, part.outputs)
        progress(f"checking {name} against torch")
        checked[name] = check_part(name, folder / f"{name}.onnx", module, limits, part_dtype)
    manifest = Manifest(
        engine="onnx", dtype=dtype, opset=OPSET, limits=limits, parts=parts, files=hash_files(folder),
        model=info.identity, sources=file_hashes(info.local_folder), versions=versions(), checked=checked,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def _exported_components(pipe: Any) -> dict[str, nn.Module]:
    """Return the components that become graphs; a text encoder that takes an attention mask stays in torch."""
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    plain = [name for name in names if not getattr(getattr(pipe, name).config, "use_attention_mask", False)]
    return {name: getattr(pipe, name) for name in ("unet", *plain, "vae")}


def _exportable(name: str, module: nn.Module, limits: Limits, pipe: Any) -> Exportable:
    if name == "unet":
        return exportable_unet(UNetWithMaps(module, impl="sdpa"), limits)
    if name == "vae":
        return exportable_decoder(module, limits, pipe.unet.config.out_channels)
    return exportable_text_encoder(module, limits, penultimate=hasattr(pipe, "text_encoder_2"))


def _config(module: Any) -> str:
    config = module.config
    return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(dict(config), indent=1)


def _overflows(pipe: Any, info: ModelInfo) -> bool:
    return says_force_upcast(info.local_folder) or (
        hasattr(pipe, "text_encoder_2") and bool(getattr(pipe.vae.config, "force_upcast", False))
    )


def check_out(out: Path) -> None:
    """Raise DiffuMaskError where the folder of a new engine exists and is not empty."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {out} ({error.strerror}): choose another folder.") from error
    if taken:
        raise DiffuMaskError(f"{out} is there already: delete it, or choose another folder.")


def need_exporter() -> None:
    """Raise DiffuMaskError where a library that writes or checks graphs is missing."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise DiffuMaskError(
                f"Export needs {library} ({error}): pip install 'diffumask-fast[{extra()}]'."
            ) from error
