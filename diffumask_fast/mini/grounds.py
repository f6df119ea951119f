"""The backgrounds of the composed world: procedural grass, street, sky, water, sand and room."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

# top and bottom of the sky: clear, hazy, overcast, evening
SKIES = np.array(
    [
        [(80, 140, 210), (150, 195, 235)],
        [(140, 180, 215), (215, 225, 230)],
        [(150, 158, 168), (200, 203, 206)],
        [(98, 108, 160), (240, 190, 150)],
    ],
    np.float32,
)


def _noise(rng: np.random.Generator, size: int, cells_x: int, cells_y: int | None = None) -> np.ndarray:
    """Smooth noise [size, size] in -1..1 with about cells_x by cells_y bumps."""
    grid = rng.uniform(-1, 1, (max(2, cells_y or cells_x), max(2, cells_x))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _blend(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(low, np.float32) + (np.asarray(high, np.float32) - low) * weight[..., None]


def _finish(canvas: np.ndarray) -> np.ndarray:
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def _rows(size: int) -> np.ndarray:
    return np.repeat(np.linspace(0, 1, size, dtype=np.float32)[:, None], size, 1)


def _colour(rng: np.random.Generator, mean: ArrayLike, together: float, apart: float = 0.0) -> np.ndarray:
    """Return a colour: the mean, moved in brightness by up to `together` and in hue by up to `apart`."""
    return np.asarray(mean, np.float32) + rng.uniform(-together, together) + rng.uniform(-apart, apart, 3)


def _fill(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(min(255, max(0, value))) for value in colour)


def _sky_canvas(rng: np.random.Generator, size: int) -> np.ndarray:
    top, bottom = SKIES[rng.choice(len(SKIES), p=(0.45, 0.25, 0.15, 0.15))] + rng.uniform(-14, 14, 3)
    canvas = _blend(top, bottom, _rows(size) ** rng.uniform(0.7, 1.4))
    cloud = _noise(rng, size, 4, 6) + 0.5 * _noise(rng, size, 9, 12)
    bright = np.minimum(bottom + 60, 248)
    return _blend(canvas, bright, np.clip(cloud - rng.uniform(0.0, 0.7), 0, 1) * 0.8)


def _ridge(rng: np.random.Generator, size: int, horizon: float, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a colour and the share [size, size] of each pixel that hills or trees above the horizon hide."""
    height = rng.uniform(0.02, 0.12) * (1 + _noise(rng, size, int(rng.integers(3, 14)), 2)[:1])
    height = np.maximum(height + rng.uniform(0, 0.02) * _noise(rng, size, 40, 2)[:1], 0)
    rows = _rows(size)
    return colour, np.clip((rows - horizon + height) * size, 0, 1) * (rows <= horizon)


def _ground(
    rng: np.random.Generator,
    size: int,
    horizon: float,
    near: np.ndarray,
    far: np.ndarray,
    texture: np.ndarray,
    ridge: np.ndarray | None = None,
) -> np.ndarray:
    """A plane from the horizon down to the viewer, sky above it; `texture` is added to its brightness."""
    sky = _sky_canvas(rng, size)
    if ridge is not None:
        sky = _blend(sky, *_ridge(rng, size, horizon, ridge))
    rows = _rows(size)
    depth = np.clip((rows - horizon) / max(1 - horizon, 1e-3), 0, 1)
    plane = _blend(np.asarray(far, np.float32), near, depth) + texture[..., None]
    return np.where((rows > horizon)[..., None], plane, sky)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    green = np.array([88, 140, 60]) + rng.uniform(-22, 22, 3)
    if rng.random() < 0.2:
        green = np.array([152, 142, 82]) + rng.uniform(-14, 14, 3)  # a dry meadow
    texture = 9 * _noise(rng, size, 40, 24) + 9 * _noise(rng, size, 8) + rng.normal(0, 4, (size, size))
    if rng.random() < 0.25:
        texture = texture + 6 * np.sign(np.sin(_rows(size).T * rng.uniform(14, 30) + rng.uniform(0, 6)))  # mown
    ridge = _colour(rng, (62, 96, 66), 18, 12) if rng.random() < 0.6 else _colour(rng, (120, 140, 160), 15, 8)
    canvas = _ground(rng, size, rng.uniform(-0.2, 0.45), green, green + (18, 14, 10), texture, ridge)
    if rng.random() < 0.25:
        canvas = _path(rng, canvas)
    return _finish(canvas)


def _path(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Lay a sandy band over the lower half of a meadow."""
    size = len(canvas)
    middle = rng.uniform(0.65, 0.95) + 0.05 * _noise(rng, size, 4, 2)[:1] + rng.uniform(-0.2, 0.2) * _rows(size).T
    weight = np.clip((rng.uniform(0.05, 0.12) - np.abs(_rows(size) - middle)) * 25, 0, 1)
    return _blend(canvas, _colour(rng, (178, 158, 122), 15, 8) + 5 * _noise(rng, size, 30)[..., None], weight)


def _street(rng: np.random.Generator, size: int) -> np.ndarray:
    horizon = rng.uniform(0.22, 0.5)
    grey = np.full(3, rng.uniform(80, 135)) + rng.uniform(-6, 6, 3)
    texture = 4 * _noise(rng, size, 30) + 5 * _noise(rng, size, 6) + rng.normal(0, 3, (size, size))
    image = Image.fromarray(_finish(_ground(rng, size, horizon, grey, grey + 20, texture)))
    draw = ImageDraw.Draw(image)
    line = int(horizon * size)
    _houses(rng, draw, size, line)
    kerb = line + max(2, int(size * rng.uniform(0.02, 0.08)))
    draw.rectangle((0, line, size, kerb), fill=_fill(_colour(rng, (160, 157, 150), 18, 5)))
    if rng.random() < 0.75:
        _road_marks(rng, draw, size, kerb)
    return np.asarray(image)


def _houses(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, line: int) -> None:
    """Draw a row of houses, with gaps and trees between them, that stand on the line."""
    x = -int(rng.integers(0, 12))
    while x < size:
        width, height = int(rng.uniform(0.14, 0.32) * size), int(rng.uniform(0.4, 1.1) * line)
        if rng.random() < 0.2:
            green, radius = _fill(_colour(rng, (70, 105, 62), 18, 10)), width * 0.4
            middle = x + width / 2
            draw.rectangle((middle - 1, line - height * 0.4, middle + 1, line), fill=(92, 72, 54))
            draw.ellipse((middle - radius, line - height * 0.9, middle + radius, line - height * 0.25), fill=green)
            x += width
            continue
        wall = _fill(_colour(rng, (155, 132, 118), 45, 18))
        draw.rectangle((x, line - height, x + width, line), fill=wall)
        if rng.random() < 0.4:
            roof = _fill(_colour(rng, (120, 80, 70), 20, 15))
            draw.polygon(
                [(x - 2, line - height), (x + width / 2, line - height * 1.25), (x + width + 2, line - height)],
                fill=roof,
            )
        pane = tuple(max(0, c - 45) for c in wall)
        for wy in range(line - height + 4, line - 5, 9):
            for wx in range(x + 3, x + width - 4, 8):
                draw.rectangle((wx, wy, wx + 3, wy + 4), fill=pane)
        x += width


def _road_marks(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, line: int) -> None:
    middle = size * rng.uniform(0.3, 0.7)
    lean = size * rng.uniform(-0.25, 0.25)
    for k in range(4):
        (y0, s0), (y1, s1) = ((line + (size - line) * s, s) for s in (((k + d) / 4) ** 1.6 for d in (0.15, 0.65)))
        x0, x1, half = middle + lean * s0, middle + lean * s1, 0.5 + 2.5 * (k + 0.5) / 4
        corners = [(x0 - half, y0), (x0 + half, y0), (x1 + 1.3 * half, y1), (x1 - 1.3 * half, y1)]
        draw.polygon(corners, fill=(225, 220, 200))


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    return _finish(_sky_canvas(rng, size))


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    blue = _colour(rng, (44, 102, 145), 14, 20)
    texture = 14 * _noise(rng, size, 5, 30) + 8 * _noise(rng, size, 12, 50)
    ridge = _colour(rng, (95, 118, 112), 20, 14) if rng.random() < 0.5 else None
    canvas = _ground(rng, size, rng.uniform(0.0, 0.5), blue, blue + 35, texture, ridge)
    return _finish(canvas)


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    beige = _colour(rng, (203, 177, 132), 16, 10)
    ripple = 5 * np.sin(_rows(size) * rng.uniform(50, 110) + 3 * _noise(rng, size, 4))
    texture = ripple + 7 * _noise(rng, size, 7) + rng.normal(0, 3, (size, size))
    horizon = rng.uniform(-0.2, 0.45)
    ridge = _colour(rng, (188, 158, 118), 14, 8) if rng.random() < 0.4 else None
    canvas = _ground(rng, size, horizon, beige, beige + 15, texture, ridge)
    if rng.random() < 0.4:
        sea = np.clip((horizon + rng.uniform(0.04, 0.14) - _rows(size)) * size, 0, 1) * (_rows(size) > horizon)
        canvas = _blend(canvas, _colour(rng, (80, 140, 165), 15, 10) + 6 * _noise(rng, size, 6, 60)[..., None], sea)
    return _finish(canvas)


def _room(rng: np.random.Generator, size: int) -> np.ndarray:
    floor_line = int(size * rng.uniform(0.5, 0.78))
    wall = _colour(rng, (196, 188, 175), 35, 22)
    canvas = np.broadcast_to(wall, (size, size, 3)) + 4 * _noise(rng, size, 3)[..., None]
    if rng.random() < 0.25:
        canvas = canvas + 7 * np.sign(np.sin(_rows(size).T * rng.uniform(40, 90)))[..., None]  # wallpaper
    # light falls in from one side
    canvas = canvas * (1 + rng.uniform(-0.18, 0.18) * (_rows(size).T - 0.5))[..., None]
    image = Image.fromarray(_finish(canvas))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 3)):
        w, h = (int(size * rng.uniform(0.15, 0.32)) for _ in range(2))
        x, y = int(rng.uniform(0, size - w)), int(rng.uniform(0, max(1, floor_line - h)))
        window = rng.random() < 0.4
        frame, inside = (
            ((238, 236, 230), (172, 205, 232)) if window else ((110, 85, 60), _fill(rng.uniform(130, 225, 3)))
        )
        draw.rectangle((x - 2, y - 2, x + w + 2, y + h + 2), fill=frame)
        draw.rectangle((x, y, x + w, y + h), fill=inside)
        if window:
            draw.line((x + w // 2, y, x + w // 2, y + h), fill=frame, width=2)
    _floor(rng, draw, size, floor_line)
    return np.asarray(image)


def _floor(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, line: int) -> None:
    """Draw boards, or a plain carpet, perhaps with a rug."""
    if rng.random() < 0.65:
        wood = _colour(rng, (150, 112, 75), 28, 10)
        for y in range(line, size, 7):
            shade = wood + rng.uniform(-8, 8)
            draw.rectangle((0, y, size, y + 6), fill=_fill(shade))
            draw.line((0, y, size, y), fill=_fill(shade - 22))
    else:
        draw.rectangle((0, line, size, size), fill=_fill(_colour(rng, (140, 136, 130), 35, 18)))
    if rng.random() < 0.35:
        half, middle = size * rng.uniform(0.25, 0.5), size * rng.uniform(0.35, 0.65)
        centre, height = line + (size - line) * 0.55, (size - line) * 0.35
        box = (middle - half, centre - height, middle + half, centre + height)
        draw.ellipse(box, fill=_fill(_colour(rng, (150, 120, 115), 30, 35)))
    draw.rectangle((0, line - 3, size, line), fill=(235, 232, 225))


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "grass": _grass, "street": _street, "sky": _sky, "water": _water, "sand": _sand, "room": _room,
}  # fmt: skip
