"""Random inputs of the kernels: what they are tuned and timed on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.kernels.shapes import KEYS

CANDIDATES, LABELS = 8, 2  # of the CRF step
CRF: dict[str, Any] = {"window": 11, "dilation": 1, "bilateral": (10.0, 80.0, 13.0), "gaussian": (3.0, 3.0)}


@dataclass(frozen=True)
class AttentionInput:
    """One cross-attention layer: q [B, N, H*D], k and v [B, T, H*D], select [Bc, T, K], maps of zeros [Bc, K, N]."""

    q: Tensor
    k: Tensor
    v: Tensor
    select: Tensor
    maps: Tensor
    heads: int

    @property
    def settings(self) -> dict[str, Any]:
        """Return heads and first row of the conditional half, as `attend` takes them."""
        return {"heads": self.heads, "first_conditional": len(self.q) - len(self.select)}

    @property
    def num_bytes(self) -> int:
        """Return the bytes that must be moved at least: q, k, v and select read, the output written, maps both."""
        return 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes + self.select.nbytes + 2 * self.maps.nbytes


def attention_input(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str | torch.device,
    generator: torch.Generator,
    *,
    rows: int,
    conditional: int,
    num: int,
) -> AttentionInput:
    """Draw one layer's input; numbers are drawn where the generator is, then moved.

    Args:
        shape: N, H and D.
        dtype: of q, k and v; select and maps are fp32.
        device: of all tensors.
        generator: of the numbers.
        rows: B.
        conditional: Bc, the last rows of the batch.
        num: K.
    """
    pixels, heads, head_dim = shape
    place: dict[str, Any] = {"generator": generator, "device": generator.device}
    q, k, v = (torch.randn(rows, count, heads * head_dim, **place).to(device, dtype) for count in (pixels, KEYS, KEYS))
    select = torch.rand(conditional, KEYS, num, **place).to(device)
    return AttentionInput(q, k, v, select, torch.zeros(conditional, num, pixels, device=device), heads)


def filter_input(
    images: int, num: int, side: int, device: str | torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a guide [B, 3, side, side] in 0..1 and maps [B, K, side, side] for the guided filter."""
    guide, maps = (
        torch.rand(images, planes, side, side, generator=generator, device=generator.device).to(device)
        for planes in (3, num)
    )
    return guide, maps


def step_input(
    images: int, side: int, device: str | torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q and its unary [B, M, L, side, side], and a guide [B, 3, side, side] in 0..255, for the CRF step."""
    place: dict[str, Any] = {"generator": generator, "device": generator.device}
    q = torch.rand(images, CANDIDATES, LABELS, side, side, **place).softmax(2).to(device)
    return q, -q.log(), 255 * torch.rand(images, 3, side, side, **place).to(device)
