"""The kernels as torch operators: one node for `torch.compile` and `torch.export`, with the Triton code behind it.

An operator also runs on the CPU, by torch, so that a program exported on one device loads on another. Importing this
module registers them.

Example:
    >>> import torch
    >>> q, k, maps = torch.zeros(2, 4, 32), torch.zeros(2, 5, 32), torch.zeros(1, 2, 4)
    >>> select = torch.eye(5)[None, :, :2]
    >>> out = torch.ops.diffumask_fast.cross_attention_maps(q, k, k, select, maps, 2, 1.0, 1, 1.0)
    >>> round(maps.max().item(), 3)
    0.2
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from diffumask_fast.kernels import attend_sdpa
from diffumask_fast.kernels.attend_triton import attend as launch_attend
from diffumask_fast.kernels.attend_triton import attend_maps as launch_attend_maps
from diffumask_fast.kernels.guided_filter import filter_planes
from diffumask_fast.kernels.guided_filter_triton import guided_filter as launch_guided_filter
from diffumask_fast.kernels.mean_field import bilateral_norm as torch_bilateral_norm
from diffumask_fast.kernels.mean_field import mean_field as torch_mean_field
from diffumask_fast.kernels.mean_field_triton import bilateral_norm as launch_bilateral_norm
from diffumask_fast.kernels.mean_field_triton import mean_field as launch_mean_field


@triton_op("diffumask_fast::cross_attention_maps", mutates_args={"maps"})
def cross_attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    maps: Tensor,
    heads: int,
    scale: float,
    first_conditional: int,
    weight: float,
) -> Tensor:
    """Cross-attend, and add to maps in place: `attend` with every argument given, Triton on CUDA."""
    if q.is_cuda:
        return launch_attend(
            q, k, v, select, maps, heads=heads, scale=scale, first_conditional=first_conditional, weight=weight
        )
    out, added = attend_sdpa.attend(q, k, v, select, heads=heads, scale=scale, first_conditional=first_conditional)
    assert added is not None
    maps.add_(added, alpha=weight)
    return out


@cross_attention_maps.register_fake
def _(q: Tensor, *rest: Any, **named: Any) -> Tensor:
    return q.new_empty(q.shape)


@triton_op("diffumask_fast::attend_maps", mutates_args={"maps"})
def attend_maps(q: Tensor, k: Tensor, select: Tensor, maps: Tensor, heads: int, scale: float, weight: float) -> None:
    """Add the maps of the conditional rows in place, as `attend` does, without an output; Triton on CUDA."""
    if q.is_cuda:
        launch_attend_maps(q, k, select, maps, heads=heads, scale=scale, weight=weight)
    else:
        maps.add_(attend_sdpa.attend_maps(q, k, select, heads=heads, scale=scale), alpha=weight)


@attend_maps.register_fake
def _(q: Tensor, k: Tensor, select: Tensor, maps: Tensor, heads: int, scale: float, weight: float) -> None:
    return None


@triton_op("diffumask_fast::guided_filter", mutates_args=())
def guided_filter(guide: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    """Smooth maps inside regions of the guide: `guided_filter`, Triton on CUDA."""
    function = launch_guided_filter if maps.is_cuda else filter_planes
    return function(guide, maps, radius, eps)


@guided_filter.register_fake
def _(guide: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    return maps.new_empty(maps.shape, dtype=torch.float32)


@triton_op("diffumask_fast::bilateral_norm", mutates_args=())
def bilateral_norm(guide: Tensor, window: int, dilation: int, bilateral: list[float]) -> Tensor:
    """Return D^-1/2 of the bilateral weights: `bilateral_norm`, Triton on CUDA."""
    function = launch_bilateral_norm if guide.is_cuda else torch_bilateral_norm
    factor, sxy, srgb = bilateral
    return function(guide, window=window, dilation=dilation, bilateral=(factor, sxy, srgb))


@bilateral_norm.register_fake
def _(guide: Tensor, window: int, dilation: int, bilateral: list[float]) -> Tensor:
    return guide.new_empty(guide[:, :1].shape, dtype=torch.float32)


@triton_op("diffumask_fast::mean_field", mutates_args=())
def mean_field(
    q: Tensor,
    unary: Tensor,
    guide: Tensor,
    norm: Tensor,
    window: int,
    dilation: int,
    bilateral: list[float],
    gaussian: list[float],
) -> Tensor:
    """Update label probabilities once: `mean_field` with every argument given, Triton on CUDA."""
    function = launch_mean_field if q.is_cuda else torch_mean_field
    widths: dict[str, Any] = {"bilateral": tuple(bilateral), "gaussian": tuple(gaussian)}
    return function(q, unary, guide, window=window, dilation=dilation, **widths, norm=norm)


@mean_field.register_fake
def _(q: Tensor, *rest: Any, **named: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.float32)
