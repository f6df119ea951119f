"""One windowed mean-field step of a dense CRF: Krähenbühl and Koltun, NIPS 2011; the window of ConvCRF, BMVC 2018."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.record import interpreted, note

IMPLS = ("auto", "torch", "triton")
Bilateral = tuple[float, float, float]  # factor, sxy, srgb
Gaussian = tuple[float, float]  # factor, sxy


def mean_field(
    q: Tensor,
    unary: Tensor,
    guide: Tensor,
    *,
    window: int,
    dilation: int = 1,
    bilateral: Bilateral = (10.0, 80.0, 13.0),
    gaussian: Gaussian = (3.0, 3.0),
    norm: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Update label probabilities once: softmax over L of -unary + c1 * S1 q + c2 * S2 q (Potts).

    S = D^-1/2 W D^-1/2 with D the row sums of W (the symmetric normalisation of pydensecrf). S1 is bilateral, with the
    weight exp(-|dp|^2 / (2 sxy^2) - |dI|^2 / (2 srgb^2)) between a pixel and those window // 2 steps of `dilation`
    pixels around it, itself included; pixels outside the image are left out. S2 is Gaussian over the whole image,
    exp(-|dp|^2 / (2 sxy^2)). Pair weights are computed offset by offset and shared by all M candidates, so no tensor of
    size window^2 x H x W is needed.

    Args:
        q: [B, M, L, H, W] probabilities over L.
        unary: [B, M, L, H, W] energies, -log of probabilities.
        guide: [B, 3, H, W] colours in 0..255.
        window: odd number of offsets along each side.
        dilation: pixels between two offsets.
        bilateral: c1, sxy in pixels, srgb in colour steps.
        gaussian: c2, sxy in pixels.
        norm: what `bilateral_norm` gives for the same guide and window; None makes it.
        impl: "torch". "triton": one launch, on CUDA or in Triton's interpreter. "auto": on CUDA the one that
            `tuned.json` has as the faster; elsewhere, and in exports, "torch".

    Returns:
        [B, M, L, H, W] fp32, sums to 1 over L.

    Raises:
        DiffuMaskError: the shapes do not fit, the window is even, a width is not positive, or impl cannot run here.

    Example:
        >>> q = torch.full((1, 1, 2, 8, 8), 0.5)
        >>> guide = torch.zeros(1, 3, 8, 8)
        >>> mean_field(q, -q.log(), guide, window=3).sum(2).allclose(torch.ones(1, 1, 8, 8))
        True
    """
    _check(q, unary, guide, gaussian, norm, impl)
    _check_window(guide, window, dilation, bilateral)
    if impl == "auto":
        choose = q.is_cuda and not torch.compiler.is_exporting()
        impl = tuned.impl("mean_field", q.device, window=window) if choose else "torch"
    note("mean_field", impl)
    if not q.numel():
        return torch.empty_like(q, dtype=torch.float32)
    if impl == "triton":
        return _triton(q, unary, guide, window, dilation, bilateral, gaussian, norm)
    q, unary, guide = q.float(), unary.float(), guide.float()
    if norm is None:
        norm = bilateral_norm(guide, window=window, dilation=dilation, bilateral=bilateral)
    norm = norm[:, None]  # [B, 1, 1, H, W]
    scaled = q * norm
    message = scaled.clone()
    for here, there, weight in _pairs(guide, window, dilation, bilateral):
        weight = weight[:, None]
        message[(..., *here)].addcmul_(weight, scaled[(..., *there)])
        message[(..., *there)].addcmul_(weight, scaled[(..., *here)])
    message.mul_(norm).mul_(bilateral[0])
    compat, sxy = gaussian
    rows, columns = (gaussian_weights(length, sxy, q.device) for length in q.shape[-2:])
    message.add_(rows @ q @ columns, alpha=compat)
    return torch.softmax(message - unary, dim=2)


def bilateral_norm(
    guide: Tensor, *, window: int, dilation: int = 1, bilateral: Bilateral = (10.0, 80.0, 13.0)
) -> Tensor:
    """Return D^-1/2 of the bilateral weights, [B, 1, H, W] fp32, for all steps on one guide; see `mean_field`."""
    _check_window(guide, window, dilation, bilateral)
    guide = guide.float()
    total = torch.ones_like(guide[:, :1])
    for here, there, weight in _pairs(guide, window, dilation, bilateral):
        total[(..., *here)] += weight
        total[(..., *there)] += weight
    return total.rsqrt()


def _triton(
    q: Tensor,
    unary: Tensor,
    guide: Tensor,
    window: int,
    dilation: int,
    bilateral: Bilateral,
    gaussian: Gaussian,
    norm: Tensor | None,
) -> Tensor:
    from diffumask_fast.kernels import mean_field_triton, operators  # noqa: F401 - importing operators registers them

    if q.is_cuda:
        place, widths = (window, dilation), (list(bilateral), list(gaussian))
        norm = torch.ops.diffumask_fast.bilateral_norm(guide, *place, widths[0]) if norm is None else norm
        return torch.ops.diffumask_fast.mean_field(q, unary, guide, norm, *place, *widths)
    if not interpreted():
        raise DiffuMaskError(f"impl 'triton' runs on CUDA, not on {q.device}: use 'torch'")
    around: dict[str, Any] = {"window": window, "dilation": dilation, "bilateral": bilateral}
    norm = mean_field_triton.bilateral_norm(guide, **around) if norm is None else norm
    return mean_field_triton.mean_field(q, unary, guide, **around, gaussian=gaussian, norm=norm)


def _pairs(
    guide: Tensor, window: int, dilation: int, bilateral: Bilateral
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], Tensor]]:
    """Yield each pair of opposite offsets once: the pixels at both ends, and the weights [B, 1, h, w] between them."""
    _, sxy, srgb = bilateral
    height, width = guide.shape[-2:]
    half = window // 2
    scaled = guide / (srgb * 2**0.5)
    for i in range(half + 1):
        for j in range(-half if i else 1, half + 1):
            dy, dx = i * dilation, j * dilation
            if dy >= height or abs(dx) >= width:
                continue
            here = slice(0, height - dy), slice(max(0, -dx), width - max(0, dx))
            there = slice(dy, height), slice(max(0, dx), width - max(0, -dx))
            distance = (scaled[(..., *here)] - scaled[(..., *there)]).square_().sum(1, keepdim=True)
            yield here, there, torch.exp(-distance - (dy * dy + dx * dx) / (2 * sxy * sxy))


def gaussian_weights(length: int, sxy: float, device: torch.device) -> Tensor:
    """Return the normalised weights [length, length] along one side; the Gaussian is a product over both."""
    index = torch.arange(length, device=device, dtype=torch.float32)
    weight = torch.exp(-(index[:, None] - index).square() / (2 * sxy * sxy))
    norm = weight.sum(1).rsqrt()
    return norm[:, None] * weight * norm


def _check(q: Tensor, unary: Tensor, guide: Tensor, gaussian: Gaussian, norm: Tensor | None, impl: str) -> None:
    if impl not in IMPLS:
        raise DiffuMaskError(f"impl is {impl!r}, here there are: {', '.join(IMPLS)}")
    if q.ndim != 5 or q.shape != unary.shape:
        raise DiffuMaskError(
            f"mean_field takes q and unary [B, M, L, H, W], not {list(q.shape)} and {list(unary.shape)}"
        )
    if guide.shape != (q.shape[0], 3, *q.shape[3:]):
        raise DiffuMaskError(f"mean_field: the guide {list(guide.shape)} does not fit q {list(q.shape)}")
    if norm is not None and norm.shape != (q.shape[0], 1, *q.shape[3:]):
        raise DiffuMaskError(f"mean_field: the norm {list(norm.shape)} is not bilateral_norm's for q {list(q.shape)}")
    if len(gaussian) != 2 or not gaussian[1] > 0:
        raise DiffuMaskError(f"mean_field takes gaussian as a factor and a width above 0, not {gaussian}")


def _check_window(guide: Tensor, window: int, dilation: int, bilateral: Bilateral) -> None:
    if guide.ndim != 4 or guide.shape[1] != 3:
        raise DiffuMaskError(f"The CRF takes a guide [B, 3, H, W], not {list(guide.shape)}")
    if window < 1 or window % 2 == 0 or dilation < 1:
        raise DiffuMaskError(f"The CRF takes an odd window and dilation >= 1, not {window} and {dilation}")
    if len(bilateral) != 3 or not (bilateral[1] > 0 and bilateral[2] > 0):
        raise DiffuMaskError(f"The CRF takes bilateral as a factor and two widths above 0, not {bilateral}")
