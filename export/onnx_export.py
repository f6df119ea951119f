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

from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.unet import UNetWithMaps, attention_places
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.check import check_part
from diffumask_fast.export.graphs import OPSET, Call, decode_call, text_call, unet_call, unet_factor, write_graph
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import Manifest, Part, hash_files, versions, write_manifest
from diffumask_fast.export.session import extra
from diffumask_fast.models.device import DTYPES
from diffumask_fast.models.find import ModelInfo, find_model
from diffumask_fast.models.hashing import file_hashes
from diffumask_fast.models.loading import load_pipe, says_force_upcast

EXTERNAL_BYTES = 2**29
Size = tuple[int, int]


def export_onnx(
    model: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    *,
    max_batch: int = 16,
    min_size: Size | None = None,
    max_size: Size | None = None,
    static: bool = False,
    columns: int = 8,
    propagate: bool = True,
    revision: str | None = None,
    external_bytes: int = EXTERNAL_BYTES,
    progress: Callable[[str], Any] = lambda _: None,
) -> Manifest:
    """Write UNet with maps, text encoders and VAE decoder as ONNX graphs, and check each against torch.

    Args:
        model: "mini", a diffusers folder or a hub id.
        out: folder of the engine; must not be there yet.
        dtype: "fp32", "fp16" or "bf16"; a VAE that overflows in fp16 stays in fp32.
        max_batch: the most images of a call.
        min_size: the least height and width, pixels; None is the model's own.
        max_size: the most; None is twice the least.
        static: exactly max_batch images (fewer are padded) of min_size.
        columns: the most phrases, and the most maps propagated at a level; up to 8 cost nothing where the heads' size
            is a multiple of 8.
        propagate: apply self-attention to earlier maps, at the levels that are small enough at min_size.
        revision: of a hub id.
        external_bytes: weights of a graph that are larger stand in a file beside it.
        progress: is told what comes next.

    Returns:
        what was written, with the figures of the check.

    Raises:
        DiffuMaskError: a library is missing, out is there, the model or a number cannot be exported, or a graph does
            not give what torch gives; nothing is left then.
    """
    need_exporter()
    out = Path(out).expanduser()
    if dtype not in DTYPES:
        raise DiffuMaskError(f"There is no dtype {dtype}: use {', '.join(DTYPES)}.")
    check_out(out)
    info = find_model(model, revision)
    pipe = load_pipe(info, torch.float32, torch.device("cpu"))
    if getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise DiffuMaskError(f"The UNet of {model} is told its guidance (LCM), which has no graph: use --engine torch.")
    limits = find_limits(pipe, max_batch, min_size, max_size, static, columns, propagate)
    with staged(out) as folder, torch.random.fork_rng(devices=[]):
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        return _write(pipe, info, folder, dtype, limits, external_bytes, progress)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a folder name to write in, which becomes `out` when all went well, and is gone when not.

    Raises:
        DiffuMaskError: out is there, or cannot be written.
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


def find_limits(
    pipe: Any,
    max_batch: int,
    min_size: Size | None,
    max_size: Size | None,
    static: bool,
    columns: int,
    propagate: bool,
) -> Limits:
    """Return the limits of an engine; for the arguments see export_onnx.

    Raises:
        DiffuMaskError: numbers that no engine can have.
    """
    unet, vae_factor = pipe.unet, pipe.vae_scale_factor
    multiple = unet_factor(unet) * vae_factor
    own = unet.config.sample_size
    own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
    least = min_size or tuple(size * vae_factor for size in own)
    most = max_size or (least if static else tuple(2 * size for size in least))
    if max_batch < 1 or columns < 1:
        raise DiffuMaskError("--max-batch and --columns must be at least 1.")
    if any(size < multiple or size % multiple for size in (*least, *most)):
        raise DiffuMaskError(f"Sizes must be multiples of {multiple} for this model, unlike {least} to {most}.")
    if any(a > b for a, b in zip(least, most, strict=True)) or (static and least != most):
        raise DiffuMaskError(f"--min-size {least} and --max-size {most} do not go together.")
    divisors = level_divisors(unet)
    pixels = {key: least[0] * least[1] // (vae_factor * divisor) ** 2 for key, divisor in divisors.items()}
    propagated = tuple(key for key, num in pixels.items() if propagate and num <= MAX_PROPAGATED_PIXELS)
    return Limits(
        rows=(2 * max_batch if static else 1, 2 * max_batch), height=(least[0], most[0]), width=(least[1], most[1]),
        multiple=multiple, vae_factor=vae_factor, channels=unet.config.out_channels,
        tokens=_tokens(pipe), columns=columns, divisors=divisors, propagated=propagated,
    )  # fmt: skip


def _tokens(pipe: Any) -> int:
    # SDXL's refiner has only the second of both
    tokenizer, encoder = pipe.tokenizer or pipe.tokenizer_2, pipe.text_encoder or pipe.text_encoder_2
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def level_divisors(unet: nn.Module) -> dict[str, int]:
    """Return level -> by how much its maps are smaller than the latents."""
    depths, depth, places = {}, 0, attention_places(unet)
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
    parts, checked = {}, {}
    for name, module in _exportable(pipe).items():
        part_dtype = "fp32" if name == "vae" and dtype == "fp16" and _overflows(pipe, info) else dtype
        progress(f"exporting {name} in {part_dtype}")
        call = _call(name, nn.Module.to(copy.deepcopy(module), DTYPES[part_dtype]), limits, pipe)
        write_graph(call, folder / f"{name}.onnx", external_bytes)
        (folder / f"{name}.json").write_text(_config(module), "utf-8")
        library = type(module).__module__.split(".")[0]
        parts[name] = Part(f"{name}.onnx", f"{name}.json", library, type(module).__name__, part_dtype, call.outputs)
        progress(f"checking {name} against torch")
        checked[name] = check_part(name, folder / f"{name}.onnx", module, limits, part_dtype)
    manifest = Manifest(
        engine="onnx", dtype=dtype, opset=OPSET, limits=limits, parts=parts, files=hash_files(folder),
        model=info.identity, sources=file_hashes(info.folder), versions=versions(), checked=checked,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def _exportable(pipe: Any) -> dict[str, nn.Module]:
    """Return the components that become graphs; a text encoder that takes a mask stays with torch."""
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    plain = [name for name in names if not getattr(getattr(pipe, name).config, "use_attention_mask", False)]
    return {name: getattr(pipe, name) for name in ("unet", *plain, "vae")}


def _call(name: str, module: nn.Module, limits: Limits, pipe: Any) -> Call:
    if name == "unet":
        return unet_call(UNetWithMaps(module, impl="sdpa"), limits)
    if name == "vae":
        return decode_call(module, limits, pipe.unet.config.out_channels)
    return text_call(module, limits, penultimate=hasattr(pipe, "text_encoder_2"))


def _config(module: nn.Module) -> str:
    config = module.config
    return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(dict(config), indent=1)


def _overflows(pipe: Any, info: ModelInfo) -> bool:
    return says_force_upcast(info.folder) or (
        hasattr(pipe, "text_encoder_2") and bool(getattr(pipe.vae.config, "force_upcast", False))
    )


def check_out(out: Path) -> None:
    """Raise DiffuMaskError where something stands in the place of a new engine."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise DiffuMaskError(f"Cannot write {out} ({error.strerror}): choose another folder.") from error
    if taken:
        raise DiffuMaskError(f"{out} is there already: delete it, or choose another folder.")


def need_exporter() -> None:
    """Raise DiffuMaskError where a library is missing that writes or checks graphs."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise DiffuMaskError(
                f"Export needs {library} ({error}): pip install 'diffumask-fast[{extra()}]'."
            ) from error
