"""Connected parts of masks: remove small ones, fill holes."""

import torch
from torch import Tensor

_ROUNDS = 4  # between two looks at whether anything still changes


def connected(values: Tensor) -> Tensor:
    """Number the connected parts of equal value, of four neighbours, by their first pixel.

    Args:
        values: [B, H, W] whole numbers.

    Returns:
        [B, H, W] int64: the flat index of the first pixel of each pixel's part.

    Example:
        >>> connected(torch.tensor([[[1, 1, 0], [0, 1, 0]]])).tolist()
        [[[0, 0, 2], [3, 0, 2]]]
    """
    size_b, height, width = values.shape
    parts = torch.arange(height * width, device=values.device).view(1, height, width).repeat(size_b, 1, 1)
    pairs = [(parts[:, 1:], parts[:, :-1], values[:, 1:] == values[:, :-1])]
    pairs += [(parts[..., 1:], parts[..., :-1], values[..., 1:] == values[..., :-1])]
    while True:
        before = parts.clone()
        for _ in range(_ROUNDS):
            for one, other, same in pairs:  # views of parts
                lower = torch.minimum(one, other)
                one.copy_(torch.where(same, lower, one))
                other.copy_(torch.where(same, torch.minimum(lower, other), other))
            flat = parts.flatten(1)
            flat.copy_(flat.gather(1, flat))
        if torch.equal(before, parts):
            return parts


def remove_small(values: Tensor, min_pixels: int) -> Tensor:
    """Set the connected parts of values [B, H, W] above 0 that have fewer than min_pixels pixels to 0."""
    parts = connected(values).flatten(1)
    counts = torch.zeros_like(parts).scatter_add_(1, parts, torch.ones_like(parts))
    return values * (counts.gather(1, parts) >= min_pixels).view_as(values)


def fill_holes(values: Tensor) -> Tensor:
    """Fill background that one class of values [B, H, W] encloses; what lies between two classes stays background."""
    parts = connected(values).flatten(1)
    large = torch.iinfo(values.dtype).max
    highest, lowest = torch.zeros_like(values), torch.full_like(values, large)
    border = torch.zeros_like(values)
    border[:, [0, -1]] = 1
    border[..., [0, -1]] = 1
    shifts = (((1, None), (None, -1), 1), ((None, -1), (1, None), 1), ((1, None), (None, -1), 2))
    for here, there, dim in (*shifts, ((None, -1), (1, None), 2)):
        at = (slice(None),) * dim
        mine, theirs = (*at, slice(*here)), (*at, slice(*there))
        neighbour = values[theirs]
        highest[mine] = torch.maximum(highest[mine], neighbour)
        lowest[mine] = torch.minimum(lowest[mine], torch.where(neighbour > 0, neighbour, large))

    def of_part(pixels: Tensor, reduce: str) -> Tensor:
        pixels = pixels.flatten(1)
        return pixels.scatter_reduce(1, parts, pixels, reduce).gather(1, parts).view_as(values)

    highest, lowest, border = of_part(highest, "amax"), of_part(lowest, "amin"), of_part(border, "amax")
    return torch.where((values == 0) & (border == 0) & (highest == lowest), highest, values)
