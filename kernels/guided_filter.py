"""Guided filter with a colour guide: He, Sun and Tang, "Guided Image Filtering", TPAMI 2013, section 3.5."""

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import reference, tuned
from diffumask_fast.kernels.record import interpreted, note

IMPLS = ("auto", "torch", "triton", "reference")
Statistics = tuple[Tensor, Tensor, tuple[Tensor, ...]]


def guided_filter(guide: Tensor, maps: Tensor, radius: int, eps: float, impl: str = "auto") -> Tensor:
    """Smooth maps inside regions of the guide and keep the guide's edges in them.

    Windows are cut off at the border and averaged over the pixels that are left. The statistics of the guide are
    shared by all K maps of an image; its 3x3 covariance is factored in closed form (LDL^T, which stays accurate in
    fp32 where the three channels are nearly equal; the adjugate does not).

    Args:
        guide: [B, 3, H, W] in 0..1.
        maps: [B, K, H, W].
        radius: half width of the square window; it may exceed the image.
        eps: added to the variance of each channel; larger is smoother.
        impl: "torch". "triton": four launches, on CUDA or in Triton's interpreter. "reference". "auto": on CUDA the one
            that `tuned.json` has as the faster; elsewhere, and in exports, "torch".

    Returns:
        [B, K, H, W] fp32, in about the range of `maps`.

    Raises:
        DiffuMaskError: the shapes do not fit, radius or eps is out of range, or impl cannot run here.

    Example:
        >>> guided_filter(torch.rand(1, 3, 9, 7), torch.rand(1, 2, 9, 7), radius=2, eps=1e-3).shape
        torch.Size([1, 2, 9, 7])
    """
    return GuidedFilter(guide, radius, eps, impl)(maps)


class GuidedFilter:
    """Filter several maps, one after the other, with one guide, whose statistics are computed once.

    Args:
        guide, radius, eps, impl: as `guided_filter`.
    """

    def __init__(self, guide: Tensor, radius: int, eps: float, impl: str = "auto") -> None:
        _check_guide(guide, radius, eps)
        if impl not in IMPLS:
            raise DiffuMaskError(f"impl is {impl!r}, here there are: {', '.join(IMPLS)}")
        self.guide, self.radius, self.eps, self.impl = guide, radius, eps, impl
        self._statistics: Statistics | None = None

    def __call__(self, maps: Tensor) -> Tensor:
        """Filter [B, K, H, W]."""
        _check_maps(self.guide, maps)
        impl = self.impl
        if impl == "auto":
            facts = {"height": maps.shape[2], "width": maps.shape[3], "radius": self.radius}
            choose = maps.is_cuda and not torch.compiler.is_exporting()
            impl = tuned.impl("guided_filter", maps.device, **facts) if choose else "torch"
        note("guided_filter", impl)
        if not maps.numel():
            return torch.empty_like(maps, dtype=torch.float32)
        if impl == "torch":
            self._statistics = self._statistics or _statistics(self.guide, self.radius, self.eps)
            return _filter(self._statistics, maps, self.radius)
        return (reference.guided_filter if impl == "reference" else _triton)(self.guide, maps, self.radius, self.eps)


def filter_planes(guide: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    """Filter in torch, for arguments that `guided_filter` has checked."""
    return _filter(_statistics(guide, radius, eps), maps, radius)


def _statistics(guide: Tensor, radius: int, eps: float) -> Statistics:
    """Return the centred guide, its means [B, 3, H, W], and its covariance, factored."""
    guide = guide.float()
    # a shift of the guide changes nothing but the rounding of its variances
    guide = guide - guide.mean((2, 3), keepdim=True)
    mean, second = box_mean(torch.cat([guide, _products(guide)], 1), radius).split([3, 6], 1)
    return guide, mean, _factor(second - _products(mean), eps)


def _products(planes: Tensor) -> Tensor:
    """Multiply each two of three planes [B, 3, H, W]: rr rg rb gg gb bb; an index tensor would not go into a graph."""
    return torch.cat([planes[:, i : i + 1] * planes[:, i:] for i in range(3)], 1)


def _filter(statistics: Statistics, maps: Tensor, radius: int) -> Tensor:
    (guide, mean, factors), maps = statistics, maps.float()
    size_b, size_k, height, width = maps.shape
    products = guide[:, None] * maps[:, :, None]  # [B, K, 3, H, W]
    planes = torch.cat([maps[:, :, None], products], 2).flatten(1, 2)
    planes = box_mean(planes, radius).view(size_b, size_k, 4, height, width)
    mean_maps, covariance = planes[:, :, 0], planes[:, :, 1:] - mean[:, None] * planes[:, :, :1]

    slope = _solve(factors, covariance)
    offset = mean_maps - (slope * mean[:, None]).sum(2)
    planes = torch.cat([offset[:, :, None], slope], 2).flatten(1, 2)
    planes = box_mean(planes, radius).view(size_b, size_k, 4, height, width)
    return planes[:, :, 0] + (planes[:, :, 1:] * guide[:, None]).sum(2)


def _triton(guide: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    from diffumask_fast.kernels import guided_filter_triton, operators  # noqa: F401 - importing operators registers them

    if maps.is_cuda:
        return torch.ops.diffumask_fast.guided_filter(guide, maps, radius, eps)
    if not interpreted():
        raise DiffuMaskError(f"impl 'triton' runs on CUDA, not on {maps.device}: use 'torch'")
    return guided_filter_triton.guided_filter(guide, maps, radius, eps)


def _check_guide(guide: Tensor, radius: int, eps: float) -> None:
    if guide.ndim != 4 or guide.shape[1] != 3:
        raise DiffuMaskError(f"guided_filter takes a guide [B, 3, H, W], not {list(guide.shape)}")
    if not isinstance(radius, int) or radius < 1 or not eps > 0:
        raise DiffuMaskError(f"guided_filter takes a whole radius >= 1 and eps > 0, not {radius} and {eps}")


def _check_maps(guide: Tensor, maps: Tensor) -> None:
    if maps.ndim != 4 or maps.shape[0] != guide.shape[0] or maps.shape[2:] != guide.shape[2:]:
        raise DiffuMaskError(f"guided_filter: maps {list(maps.shape)} do not fit the guide {list(guide.shape)}")


def box_mean(planes: Tensor, radius: int) -> Tensor:
    """Average each plane [B, P, H, W] over (2 radius + 1)^2 windows, cut off at the border."""
    return _line_mean(_line_mean(planes, radius, 3), radius, 2)


def _line_mean(planes: Tensor, radius: int, dim: int) -> Tensor:
    length = planes.shape[dim]
    radius = min(radius, length - 1)
    sums = planes.cumsum(dim)
    means = torch.empty_like(sums)
    means.narrow(dim, 0, length - radius).copy_(sums.narrow(dim, radius, length - radius))
    means.narrow(dim, length - radius, radius).copy_(sums.narrow(dim, length - 1, 1))
    rest = length - radius - 1
    means.narrow(dim, radius + 1, rest).sub_(sums.narrow(dim, 0, rest))
    index = torch.arange(length, device=planes.device)
    count = (index + radius + 1).clamp(max=length) - (index - radius).clamp(min=0)
    return means.div_(count if dim == 3 else count[:, None])


def _factor(covariance: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return d1, d2, d3, l21, l31, l32 of covariance [B, 6, H, W] + eps I = L D L^T, each [B, 1, H, W]."""
    s11, s12, s13, s22, s23, s33 = covariance[:, :, None].unbind(1)
    d1 = s11.clamp(min=0) + eps
    l21, l31 = s12 / d1, s13 / d1
    d2 = (s22 - l21 * s12).clamp(min=0) + eps
    rest = s23 - l31 * s12
    l32 = rest / d2
    d3 = (s33 - l31 * s13 - l32 * rest).clamp(min=0) + eps
    return d1, d2, d3, l21, l31, l32


def _solve(factors: tuple[Tensor, ...], right: Tensor) -> Tensor:
    """Solve L D L^T x = right for right [B, K, 3, H, W]."""
    d1, d2, d3, l21, l31, l32 = factors
    y1, y2, y3 = right.unbind(2)  # each [B, K, H, W]
    y2 = y2 - l21 * y1
    y3 = y3 - l31 * y1 - l32 * y2
    x3 = y3 / d3
    x2 = y2 / d2 - l32 * x3
    x1 = y1 / d1 - l21 * x2 - l31 * x3
    return torch.stack([x1, x2, x3], 2)
