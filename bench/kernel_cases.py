"""The kernels under pytest-benchmark; `bench/kernels.py` runs this file and makes rows of its results."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffumask_fast.bench.geometries import unet_config
from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field, winograd
from diffumask_fast.kernels.inputs import CANDIDATES, CRF, LABELS, attention_input, filter_input, step_input
from diffumask_fast.kernels.shapes import KEYS, MODELS

SETTINGS = json.loads(os.environ.get("DIFFUMASK_FAST_KERNELS", '{"geometry": "mini", "device": "cpu"}'))
GEOMETRY, DEVICE = SETTINGS["geometry"], SETTINGS["device"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPES = ("fp32", "bf16") if DEVICE == "cpu" else ("fp16", "bf16", "fp32")
ATTENTION_IMPLS = ("sdpa", "cpp") if DEVICE == "cpu" else ("sdpa", "triton")
CONVOLUTION_IMPLS = ("direct", "winograd") if DEVICE == "cpu" else ("direct",)
FILTER_IMPLS = ("torch",) if DEVICE == "cpu" else ("torch", "triton")
ROWS = 16 if GEOMETRY == "mini" else 2  # of a guided batch
CLASSES = 2
MOST_CHANNELS = 640  # of the convolutions: wider ones are torch's in the compiled engine too


def convolutions(geometry: str, rows: int) -> list[tuple[int, int, int, int]]:
    """Return batch, channels in and out, side: a UNet's 3x3 convolutions, and the embedded decoder's last ones."""
    config = unet_config(geometry)
    sides = ((channels, config["sample_size"] >> level) for level, channels in enumerate(config["block_out_channels"]))
    shapes = [(rows, channels, channels, side) for channels, side in sides if channels <= MOST_CHANNELS]
    return [*shapes, (2, 32, 32, 128)] if geometry == "mini" else shapes


SIZE = 8 * unet_config(GEOMETRY)["sample_size"]
SHAPES = [(ROWS, *layer.shape) for layer in MODELS[GEOMETRY].layers]
CONVOLUTIONS = convolutions(GEOMETRY, ROWS)


def case_of(shape: tuple[int, ...]) -> str:
    """Return the name of a shape."""
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=case_of)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", ATTENTION_IMPLS)
def test_cross_attention_maps(benchmark: Any, impl: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    rows, layer = shape[0], shape[1:]
    pixels, heads, head_dim = layer
    half, rng = rows // 2, torch.Generator().manual_seed(0)
    given = attention_input(layer, DTYPES[dtype], DEVICE, rng, rows=rows, conditional=half, num=CLASSES)
    flops = 4 * rows * pixels * KEYS * heads * head_dim + 2 * half * heads * pixels * KEYS * CLASSES
    settings: dict[str, Any] = {**given.settings, "maps": given.maps, "impl": impl}
    _run(benchmark, given.num_bytes, flops, dtype, lambda: attend(given.q, given.k, given.v, given.select, **settings))


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=case_of)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", CONVOLUTION_IMPLS)
def test_convolution(benchmark: Any, impl: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    rows, channels, out, side = shape
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(rows, channels, side, side, generator=rng).to(DEVICE, DTYPES[dtype])
    weight = torch.randn(out, channels, 3, 3, generator=rng).to(DEVICE, DTYPES[dtype]) / (9 * channels) ** 0.5
    image, weight = (x.contiguous(memory_format=torch.channels_last) for x in (image, weight))
    bias = torch.zeros(out, device=DEVICE, dtype=DTYPES[dtype])
    pixels, item = rows * side**2, DTYPES[dtype].itemsize
    moved = pixels * (channels + out) * item
    if impl == "direct":
        moved, products = moved + weight.nbytes, 9 * pixels

        def call() -> torch.Tensor:
            return torch.conv2d(image, weight, bias, padding=1)
    else:
        weights = winograd.transform(weight)
        moved, products = moved + weights.nbytes, 36 * rows * (-(-side // 4)) ** 2

        def call() -> torch.Tensor:
            return winograd.convolve(image, weights, bias, out)

    # the products of Winograd's are in fp32 whatever the image is
    _run(benchmark, moved, 2 * products * channels * out, dtype if impl == "direct" else "fp32", call)


@pytest.mark.parametrize("size", (SIZE,))
@pytest.mark.parametrize("impl", FILTER_IMPLS)
def test_guided_filter(benchmark: Any, impl: str, size: int) -> None:
    guide, maps = filter_input(4, CLASSES, size, DEVICE, torch.Generator().manual_seed(0))
    moved = guide.nbytes + 2 * maps.nbytes
    flops = guide[:, :1].numel() * (120 + 60 * CLASSES)  # about: means, products and the closed 3x3 inverse
    _run(benchmark, moved, flops, "fp32", lambda: guided_filter(guide, maps, max(1, size // 16), 1e-3, impl=impl))


@pytest.mark.parametrize("size", (SIZE,))
@pytest.mark.parametrize("impl", FILTER_IMPLS)
def test_mean_field(benchmark: Any, impl: str, size: int) -> None:
    q, unary, guide = step_input(1, size, DEVICE, torch.Generator().manual_seed(0))
    norm = bilateral_norm(guide, **{name: CRF[name] for name in ("window", "dilation", "bilateral")})
    moved = 3 * q.nbytes + guide.nbytes + norm.nbytes
    # a weight is 14 operations and meets each plane in 2; the Gaussian is two products along the sides
    planes = CANDIDATES * LABELS
    flops = size**2 * (CRF["window"] ** 2 * (14 + 2 * planes) + 4 * planes * size)
    _run(benchmark, moved, flops, "fp32", lambda: mean_field(q, unary, guide, **CRF, norm=norm, impl=impl))


@pytest.mark.parametrize("dtype", TYPES)
def test_ceiling_matmul(benchmark: Any, dtype: str) -> None:
    side = 768 if DEVICE == "cpu" else 8192
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
    _run(benchmark, 3 * left.nbytes, 2 * side**3, dtype, lambda: left @ right)


def test_ceiling_copy(benchmark: Any) -> None:
    source = torch.rand((64 if DEVICE == "cpu" else 1024) * 2**18, device=DEVICE)
    target = torch.empty_like(source)
    _run(benchmark, 2 * source.nbytes, 0, "fp32", lambda: target.copy_(source))


def _run(benchmark: Any, moved: int, flops: int, dtype: str, call: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    benchmark.extra_info.update(bytes=moved, flops=flops, dtype=dtype)

    def timed() -> None:
        call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark(timed)
