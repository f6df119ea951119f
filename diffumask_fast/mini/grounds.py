"""The backgrounds of the composed world: procedural grass, street, sky, water, sand and room."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw


def _noise(rng: np.random.Generator, size: int, cells_x: int, cells_y: int | None = None) -> np.ndarray:
    """Smooth noise [size, size] in -1..1 with about cells_x by cells_y bumps."""
    grid = rng.uniform(-1, 1, (max(2, cells_y or cells_x), max(2, cells_x))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _blend(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(low, np.float32) + (np.asarray(high, np.float32) - low) * weight[..., None]


def _finish(canvas: np.ndarray) -> np.ndarray:
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def _rows(size: int) -> np.ndarray:
    """Return how far down each pixel is, [size, size] in 0..1."""
    return np.repeat(np.linspace(0, 1, size, dtype=np.float32)[:, None], size, 1)


def _sky_canvas(rng: np.random.Generator, size: int) -> np.ndarray:
    top = np.array([90, 150, 215]) + rng.uniform(-25, 25, 3)
    canvas = _blend(top, top + rng.uniform(30, 70), _rows(size))
    cloud = _noise(rng, size, 4, 6) + 0.5 * _noise(rng, size, 9, 12)
    return _blend(canvas, np.full(3, 240.0), np.clip(cloud - rng.uniform(0.0, 0.6), 0, 1) * 0.8)


def _ground(
    rng: np.random.Generator, size: int, horizon: float, near: np.ndarray, far: np.ndarray, texture: np.ndarray
) -> np.ndarray:
    """A plane from the horizon down to the viewer, sky above it; `texture` is added to its brightness."""
    sky = _sky_canvas(rng, size)
    rows = _rows(size)
    depth = np.clip((rows - horizon) / max(1 - horizon, 1e-3), 0, 1)
    plane = _blend(np.asarray(far, np.float32), near, depth) + texture[..., None]
    return np.where((rows > horizon)[..., None], plane, sky)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    green = np.array([88, 145, 60]) + rng.uniform(-22, 22, 3)
    texture = 9 * _noise(rng, size, 40, 24) + 9 * _noise(rng, size, 8) + rng.normal(0, 4, (size, size))
    canvas = _ground(rng, size, rng.uniform(-0.2, 0.35), green, green + (18, 14, 10), texture)
    return _finish(canvas)


def _street(rng: np.random.Generator, size: int) -> np.ndarray:
    horizon = rng.uniform(0.25, 0.5)
    grey = np.full(3, rng.uniform(85, 125)) + rng.uniform(-5, 5, 3)
    texture = 4 * _noise(rng, size, 30) + 5 * _noise(rng, size, 6) + rng.normal(0, 3, (size, size))
    image = Image.fromarray(_finish(_ground(rng, size, horizon, grey, grey + 20, texture)))
    draw = ImageDraw.Draw(image)
    line = int(horizon * size)
    x = -int(rng.integers(0, 12))
    while x < size:
        width, height = int(rng.uniform(0.14, 0.32) * size), int(rng.uniform(0.4, 1.1) * line)
        wall = tuple(int(c) for c in np.array([150, 125, 110]) + rng.uniform(-45, 45) + rng.uniform(-15, 15, 3))
        draw.rectangle((x, line - height, x + width, line), fill=wall)
        pane = tuple(max(0, c - 45) for c in wall)
        for wy in range(line - height + 4, line - 5, 9):
            for wx in range(x + 3, x + width - 4, 8):
                draw.rectangle((wx, wy, wx + 3, wy + 4), fill=pane)
        x += width
    draw.rectangle((0, line, size, line + max(2, size // 40)), fill=(165, 162, 155))
    middle = size * rng.uniform(0.35, 0.65)
    for k in range(4):
        y0, y1 = (line + (size - line) * ((k + d) / 4) ** 1.6 for d in (0.15, 0.65))
        half = 0.5 + 2.5 * (k + 0.5) / 4
        draw.polygon(
            [(middle - half, y0), (middle + half, y0), (middle + 1.3 * half, y1), (middle - 1.3 * half, y1)],
            fill=(225, 220, 200),
        )
    return np.asarray(image)


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    return _finish(_sky_canvas(rng, size))


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    blue = np.array([40, 100, 150]) + rng.uniform(-20, 20, 3)
    texture = 14 * _noise(rng, size, 5, 30) + 8 * _noise(rng, size, 12, 50)
    return _finish(_ground(rng, size, rng.uniform(0.0, 0.45), blue, blue + 35, texture))


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    beige = np.array([205, 178, 130]) + rng.uniform(-18, 18, 3)
    ripple = 5 * np.sin(_rows(size) * rng.uniform(50, 110) + 3 * _noise(rng, size, 4))
    texture = ripple + 7 * _noise(rng, size, 7) + rng.normal(0, 3, (size, size))
    return _finish(_ground(rng, size, rng.uniform(-0.2, 0.35), beige, beige + 15, texture))


def _room(rng: np.random.Generator, size: int) -> np.ndarray:
    floor_line = int(size * rng.uniform(0.55, 0.75))
    wall = np.array([200, 190, 175]) + rng.uniform(-35, 35) + rng.uniform(-14, 14, 3)
    canvas = np.broadcast_to(wall, (size, size, 3)) + 4 * _noise(rng, size, 3)[..., None]
    image = Image.fromarray(_finish(canvas))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 3)):
        w, h = (int(size * rng.uniform(0.15, 0.3)) for _ in range(2))
        x, y = int(rng.uniform(0, size - w)), int(rng.uniform(0, max(1, floor_line - h)))
        draw.rectangle((x - 2, y - 2, x + w + 2, y + h + 2), fill=(110, 85, 60))
        draw.rectangle((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.uniform(130, 225, 3)))
    wood = np.array([150, 110, 70]) + rng.uniform(-25, 25, 3)
    for y in range(floor_line, size, 7):
        shade = wood + rng.uniform(-8, 8)
        draw.rectangle((0, y, size, y + 6), fill=tuple(int(c) for c in shade))
        draw.line((0, y, size, y), fill=tuple(int(c - 22) for c in shade))
    draw.rectangle((0, floor_line - 3, size, floor_line), fill=(235, 232, 225))
    return np.asarray(image)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "grass": _grass, "street": _street, "sky": _sky, "water": _water, "sand": _sand, "room": _room,
}  # fmt: skip
