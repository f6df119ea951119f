"""What `diffumask-fast doctor` reports: versions, devices, what works here and what does not."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

from diffumask_fast.errors import DiffuMaskError

PACKAGES = (
    "diffumask-fast", "torch", "diffusers", "transformers", "triton", "safetensors", "numpy", "pillow", "pyarrow",
    "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "xformers", "tensorrt", "tensorrt-rtx-cu13-libs",
)  # fmt: skip


def examine() -> dict[str, dict[str, Any]]:
    """Return versions, devices, "works" or why not for each feature, what would be faster, and conflicts."""
    sections = {"versions": _versions, "devices": _devices, "works": _works, "faster": _faster, "conflicts": _conflicts}
    return {name: section() for name, section in sections.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        found["cuda"] = "none that torch sees"
    return found


def _works() -> dict[str, str]:
    checks = {
        "embedded model": _embedded_model,
        "maps in attention": _maps,
        "torch engine": _torch_engine,
        "xformers": _xformers,
        "compile engine": _compile_engine,
        "export to onnx": _onnx_export,
        "onnx engine": _onnx_engine,
        "export to tensorrt-rtx": _rtx_export,
        "tensorrt-rtx engine": _rtx_engine,
        "export to tensorrt": _tensorrt_export,
        "tensorrt engine": _tensorrt_engine,
    }
    report = {}
    for name, check in checks.items():
        try:
            check()
            report[name] = "works"
        except Exception as error:  # noqa: BLE001 - the reason is the answer
            reason = error.as_flags() if isinstance(error, DiffuMaskError) else str(error)
            report[name] = f"does not work: {' '.join(reason.split())[:200] or type(error).__name__}"
    return report


def _faster() -> dict[str, str]:
    """Return the options that are faster here than the defaults, with what they cost."""
    import torch

    from diffumask_fast.kernels import native

    found = {}
    if not torch.cuda.is_available() and has_bf16():
        found["--dtype bf16"] = "this processor multiplies it in hardware; images and masks differ by rounding"
    try:
        native.library()
        found["--engine compile"] = "for a few hundred images and more: it first compiles for a minute"
    except DiffuMaskError:
        pass
    return found


def _conflicts() -> dict[str, str]:
    """Return the packages that must not be installed together, with what to do."""
    from diffumask_fast.export.session import PACKAGES, REMOVE, installed

    found = {}
    if len(installed()) == len(PACKAGES):
        found[" and ".join(PACKAGES)] = (
            f"both fill one module, of which either may have written any file: {REMOVE}, then install one of them "
            "again, onnxruntime-gpu for CUDA"
        )
    versions = _versions()
    if _at_least(versions["numpy"], 2, 4) and not _at_least(versions["triton"], 3, 7):
        found["numpy and triton"] = (
            f"the interpreter of Triton {versions['triton']}, which only tests need, fails with numpy "
            f"{versions['numpy']}: pip install 'triton>=3.7', or 'numpy<2.4'"
        )
    return found


def _at_least(version: str, *least: int) -> bool:
    """Compare the first two numbers of a version; what is not installed counts as later than all."""
    numbers = version.split(".")[:2]
    return not all(number.isdecimal() for number in numbers) or tuple(map(int, numbers)) >= least


def has_bf16() -> bool:
    """Tell whether the processor multiplies bf16 in hardware (AVX-512 BF16, AMX)."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _embedded_model() -> None:
    from diffumask_fast.models.find import find_model

    find_model("mini")


def _maps() -> None:
    import torch

    from diffumask_fast.kernels import attend

    q = torch.randn(1, 4, 32)
    out, maps = attend(q, q, q, torch.eye(4)[None], heads=2)
    if maps is None or not torch.allclose(maps.sum(1), torch.ones(1, 4), atol=1e-4):
        raise RuntimeError("attention weights do not sum to 1")


def _torch_engine() -> None:
    from diffumask_fast.models.loading import quietly

    with quietly():
        importlib.import_module("diffusers").StableDiffusionPipeline  # noqa: B018 - a lazy import that can fail


def _xformers() -> None:
    import torch

    from diffumask_fast.attention.choice import check_attention

    check_attention("xformers", "torch", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    q = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.float16)
    importlib.import_module("xformers.ops").memory_efficient_attention(q, q, q)


def _compile_engine() -> None:
    import torch

    from diffumask_fast.kernels import native

    if not torch.cuda.is_available():
        native.library()


def _onnx_export() -> None:
    from diffumask_fast.export.onnx_export import need_exporter

    need_exporter()


def _onnx_engine() -> None:
    import torch

    from diffumask_fast.export.session import REMOVE, runtime

    providers = runtime().get_available_providers()
    if torch.cuda.is_available() and "CUDAExecutionProvider" not in providers:
        raise DiffuMaskError(f"on the CPU only: {REMOVE}, then pip install 'diffumask-fast[gpu]' for CUDA")


def _rtx_export() -> None:
    from diffumask_fast.export.tensorrt_library import library

    _onnx_export()
    library("tensorrt-rtx")


def _rtx_engine() -> None:
    from diffumask_fast.export.tensorrt_build import known_targets
    from diffumask_fast.export.tensorrt_library import library

    targets, here = known_targets(library("tensorrt-rtx")), _need_gpu()
    if here not in targets:
        raise DiffuMaskError(f"it runs on compute capability {', '.join(targets)}, and the GPU here has {here}")


def _tensorrt_export() -> None:
    _onnx_export()
    _tensorrt_engine()


def _tensorrt_engine() -> None:
    from diffumask_fast.export.tensorrt_library import library

    library("tensorrt")
    _need_gpu()


def _need_gpu() -> str:
    from diffumask_fast.export.tensorrt_library import compute_capability

    found = compute_capability()
    if found is None:
        raise DiffuMaskError("torch sees no NVIDIA GPU here")
    return found
