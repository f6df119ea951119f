"""3x3 convolutions on the CPU by Winograd's F(4x4, 3x3), in C++.

For 4x4 pixels of a channel a direct convolution makes 144 products, this one 36, always in fp32. Its errors are about
five times those of a direct one in fp32: 1e-6 of the largest value nearby, so a small value beside a large one has a
larger share of error. An infinity becomes NaN in its whole tile. There is no gradient. The compiled engine uses it.

Example:
    >>> image, weight = torch.rand(1, 16, 8, 8), torch.rand(32, 16, 3, 3)
    >>> out = convolve(image, transform(weight), None, 32)
    >>> torch.allclose(out, torch.conv2d(image, weight, padding=1), atol=1e-4)
    True
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from diffumask_fast.kernels.native import library

CHANNELS_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16)


def pays(rows: int, height: int, width: int) -> bool:
    """Return whether this is the faster convolution for images of a size: they fill some tiles, and most of each."""
    tiles = rows * -(-height // 4) * -(-width // 4)
    return tiles >= 4 and rows * height * width >= 10 * tiles


def transform(weight: Tensor) -> Tensor:
    """Transform the weights of a convolution, G w G^T of the paper.

    Args:
        weight: [O, C, 3, 3], on the CPU.

    Returns:
        [36, panels, C, columns of a panel], fp32, O padded with zeros to whole panels: for each of the 36 points a
        matrix [C, O] in the order in which the C++ reads it.
    """
    squares = ((0.5, 2.0), (2.0, 0.5))  # of the points +-A and +-B in the C++, each with that of the other
    points = [(sign * own**0.5, 2 * own * (own - other)) for own, other in squares for sign in (1, -1)]
    rows = [[1.0, 0.0, 0.0], *([1 / n, p / n, p * p / n] for p, n in points), [0.0, 0.0, 1.0]]
    g, w, panel = torch.tensor(rows, dtype=torch.float64), weight.detach().double(), library().panel()
    matrices = torch.einsum("ij,ocjk,lk->ilco", g, w, g).flatten(0, 1).float()
    padded = F.pad(matrices, (0, -weight.shape[0] % panel))
    return padded.unflatten(2, (-1, panel)).transpose(1, 2).contiguous()


@torch.library.custom_op("diffumask_fast::winograd", mutates_args=(), device_types="cpu")
def convolve(image: Tensor, weights: Tensor, bias: Tensor | None, channels: int, doubled: bool = False) -> Tensor:
    """Convolve an image by 3x3 weights, with a border of one pixel of zeros.

    Args:
        image: [B, C, H, W], fp32 or bf16.
        weights: what `transform` made of [O, C, 3, 3].
        bias: [O], of the image's dtype.
        channels: O; this and C are multiples of CHANNELS_MULTIPLE.
        doubled: convolve the image with each pixel repeated, of twice its height and width.

    Returns:
        [B, O, H, W], or [B, O, 2H, 2W] of a doubled image, channels_last, of the image's dtype.

    Raises:
        ValueError: shapes or dtypes are others.
        MemoryError: there is no memory for the tiles in work.
    """
    panel = library().panel()
    if image.ndim != 4 or image.dtype not in DTYPES or image.shape[1] % CHANNELS_MULTIPLE:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: fp32 or bf16 [B, C by 16, H, W] is needed")
    if channels % CHANNELS_MULTIPLE or bias is not None and (bias.shape, bias.dtype) != ((channels,), image.dtype):
        raise ValueError(f"{channels} channels by 16 are needed, and a bias of as many in {image.dtype}")
    if weights.dtype != torch.float32 or weights.shape != (36, -(-channels // panel), image.shape[1], panel):
        raise ValueError(f"the weights are not what transform makes for {image.shape[1]} to {channels} channels")
    result = _result(image, weights, bias, channels, doubled)
    if not result.numel():
        return result
    image, weights = image.contiguous(memory_format=torch.channels_last), weights.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, _, height, width = result.shape
    shape = (ctypes.c_int64 * 6)(rows, height, width, image.shape[1], channels, doubled)
    function = library().convolve_fp32 if image.dtype == torch.float32 else library().convolve_bf16
    pointers = (None if x is None else x.data_ptr() for x in (image, weights, bias, result))
    if function(*pointers, ctypes.addressof(shape), torch.get_num_threads()):
        raise MemoryError("there is no memory for the tiles of a convolution")
    return result


@convolve.register_fake
def _result(image: Tensor, weights: Tensor, bias: Tensor | None, channels: int, doubled: bool = False) -> Tensor:
    size = (image.shape[0], channels, *(side * (2 if doubled else 1) for side in image.shape[2:]))
    return torch.empty(size, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
