"""The kernels under pytest-benchmark; `bench/kernels.py` runs this file and makes rows of what it finds."""

import json
import os
from typing import Any

import pytest
import torch

from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field, winograd

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# batch, query pixels, heads, head size: each level of the embedded model and of Stable Diffusion
SHAPES = {
    "mini": ((16, 256, 4, 16), (16, 64, 4, 32), (16, 16, 4, 40)),
    "sd15": ((2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160)),
    "sd21": ((2, 9216, 5, 64), (2, 2304, 10, 64), (2, 576, 20, 64), (2, 144, 20, 64)),
    "sdxl": ((2, 4096, 10, 64), (2, 1024, 20, 64)),
}
# batch, channels in and out, side of the image: 3x3 convolutions of UNets, and the last ones of the embedded decoder
CONVOLUTIONS = {
    "mini": ((16, 64, 64, 16), (16, 128, 128, 8), (16, 160, 160, 4), (2, 32, 32, 128)),
    "sd15": ((2, 320, 320, 64), (2, 640, 640, 32)),
    "sd21": ((2, 320, 320, 96), (2, 640, 640, 48)),
    "sdxl": ((2, 320, 320, 128), (2, 640, 640, 64)),
}
SIZES = {"mini": 128, "sd15": 512, "sd21": 768, "sdxl": 1024}
TOKENS, CLASSES = 77, 2
SETTINGS = json.loads(os.environ.get("DIFFUMASK_FAST_KERNELS", '{"geometry": "mini", "device": "cpu"}'))
DEVICE = SETTINGS["device"]
TYPES = ("fp32", "bf16") if DEVICE == "cpu" else ("fp16", "bf16", "fp32")
IMPLS = ("sdpa", "cpp") if DEVICE == "cpu" else ("sdpa", "triton")
WAYS = ("direct", "winograd") if DEVICE == "cpu" else ("direct",)
FORMS = ("torch",) if DEVICE == "cpu" else ("torch", "triton")
WINDOW, CANDIDATES = 11, 8


@pytest.mark.parametrize("shape", SHAPES[SETTINGS["geometry"]], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_cross_attention_maps(benchmark: Any, impl: str, dtype: str, shape: tuple[int, ...]) -> None:
    size_b, pixels, heads, width = shape
    kind, rng = DTYPES[dtype], torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size_b, count, heads * width, generator=rng).to(DEVICE, kind) for count in (pixels, TOKENS, TOKENS)
    )
    half = size_b // 2
    select = torch.rand(half, TOKENS, CLASSES, generator=rng).to(DEVICE)
    maps = torch.zeros(half, CLASSES, pixels, device=DEVICE)
    item = kind.itemsize
    moved = (2 * q.numel() + k.numel() + v.numel()) * item + 8 * maps.numel() + 4 * select.numel()
    flops = 4 * size_b * pixels * TOKENS * heads * width + 2 * half * heads * pixels * TOKENS * CLASSES
    settings = {"heads": heads, "first_conditional": half, "maps": maps, "impl": impl}
    _run(benchmark, moved, flops, dtype, lambda: attend(q, k, v, select, **settings))


@pytest.mark.parametrize("shape", CONVOLUTIONS[SETTINGS["geometry"]], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", WAYS)
def test_convolution(benchmark: Any, impl: str, dtype: str, shape: tuple[int, ...]) -> None:
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

        def call() -> Any:
            return torch.conv2d(image, weight, bias, padding=1)
    else:
        weights = winograd.transform(weight)
        moved, products = moved + weights.nbytes, 36 * rows * (-(-side // 4)) ** 2

        def call() -> Any:
            return winograd.convolve(image, weights, bias, out)

    # the products of Winograd's are in fp32 whatever the image is
    _run(benchmark, moved, 2 * products * channels * out, dtype if impl == "direct" else "fp32", call)


@pytest.mark.parametrize("size", (SIZES[SETTINGS["geometry"]],))
@pytest.mark.parametrize("impl", FORMS)
def test_guided_filter(benchmark: Any, impl: str, size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    guide = torch.rand(4, 3, size, size, generator=rng).to(DEVICE)
    maps = torch.rand(4, CLASSES, size, size, generator=rng).to(DEVICE)
    moved = 4 * (guide.numel() + 2 * maps.numel())
    flops = guide[:, :1].numel() * (120 + 60 * CLASSES)  # about: means, products and the closed 3x3 inverse
    _run(benchmark, moved, flops, "fp32", lambda: guided_filter(guide, maps, max(1, size // 16), 1e-3, impl=impl))


@pytest.mark.parametrize("size", (SIZES[SETTINGS["geometry"]],))
@pytest.mark.parametrize("impl", FORMS)
def test_mean_field(benchmark: Any, impl: str, size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(1, CANDIDATES, 2, size, size, generator=rng).softmax(2).to(DEVICE)
    guide, unary = 255 * torch.rand(1, 3, size, size, generator=rng).to(DEVICE), -q.log()
    norm = bilateral_norm(guide, window=WINDOW)
    moved = 4 * (3 * q.numel() + guide.numel() + norm.numel())
    # a weight is 14 operations and meets each plane in 2; the Gaussian is two products along the sides
    flops = size**2 * (WINDOW**2 * (14 + 4 * CANDIDATES) + 8 * CANDIDATES * size)
    _run(benchmark, moved, flops, "fp32", lambda: mean_field(q, unary, guide, window=WINDOW, norm=norm, impl=impl))


@pytest.mark.parametrize("dtype", TYPES)
def test_ceiling_matmul(benchmark: Any, dtype: str) -> None:
    side = 768 if DEVICE == "cpu" else 8192
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
    _run(benchmark, 3 * left.nbytes, 2 * side**3, dtype, lambda: left @ right)


def test_ceiling_copy(benchmark: Any) -> None:
    source = torch.rand((64 if DEVICE == "cpu" else 1024) * 2**18, device=DEVICE)
    target = torch.empty_like(source)
    _run(benchmark, 2 * source.nbytes, 0, "fp32", lambda: target.copy_(source))


def _run(benchmark: Any, moved: int, flops: int, dtype: str, call: Any) -> None:
    torch.set_num_threads(1)
    benchmark.extra_info.update(bytes=moved, flops=flops, dtype=dtype)

    def timed() -> None:
        call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark(timed)
