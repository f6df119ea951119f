"""The composed world: cut-out objects on procedural backgrounds, with captions and exact masks.

A scene is a pure function of (seed, index). The world is the training data of the embedded model and the "real data"
of every experiment, so its masks are exact by construction: the alpha channel of what was pasted.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.mini.grounds import BACKGROUNDS
from diffumask_fast.pictures import decode_picture
from diffumask_fast.prompts.english import article
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary

ASSETS = Path(__file__).parent / "assets"
VOC = {entry.name: entry for entry in Vocabulary.voc().entries}
SCENES = {
    "grass": "on the grass",
    "street": "on the street",
    "sky": "in the sky",
    "water": "on the water",
    "sand": "on the sand",
    "room": "in a room",
}
HOME = {
    "aeroplane": ("sky", "street"), "bird": ("sky", "grass", "water"), "boat": ("water", "sand"), "bottle": ("room",),
    "bus": ("street",), "car": ("street", "sand"), "cat": ("room", "grass"), "chair": ("room",),
    "cow": ("grass", "sand"), "dog": ("grass", "room"), "horse": ("grass", "sand"), "motorbike": ("street",),
    "person": ("street", "grass", "room"), "pottedplant": ("room", "street"), "sheep": ("grass",), "sofa": ("room",),
    "train": ("street", "grass"), "tvmonitor": ("room",),
}  # fmt: skip
PERMISSIVE = ("CC0", "Public domain", "MIT", "Apache-2.0", "CC-BY-3.0", "CC-BY-4.0")


@dataclass(frozen=True)
class Sprite:
    """A cut-out object: RGBA picture, its class, the model it shows (views of one model share it), its licence."""

    name: str
    model: str
    licence: str
    image: Image.Image


@dataclass(frozen=True)
class Scene:
    """One composed picture: image uint8 [S, S, 3], mask uint8 [S, S] of VOC class ids, prompt, class names."""

    image: np.ndarray
    mask: np.ndarray
    prompt: str
    classes: tuple[str, ...]
    scene: str
    sprites: tuple[str, ...]


def load_sprites(assets: Path | None = None, names: str = "small", objects: str = "kept") -> list[Sprite]:
    """Read the world's cut-outs, sorted by class and path.

    Args:
        assets: a folder with `sprites.csv` (columns path, class, model, kind, licence, and perhaps objects); the
            packaged one when None.
        names: "small" (the 18 classes that the folder packaged here holds) or "full" (all 20 VOC classes).
        objects: "kept" (those the packaged weights were trained on) or "held-out" (others of the same classes, to test
            on). Where `sprites.csv` has no column objects, a fifth of the models is held out, by a hash of their names.

    Raises:
        DiffuMaskError: the folder holds no usable cut-outs.
    """
    folder = Path(assets) if assets else ASSETS
    table = next((path for path in (folder / "sprites.csv", folder / "sprites" / "sprites.csv") if path.exists()), None)
    if table is None:
        raise DiffuMaskError(f"{folder} has no sprites.csv: point `assets` at a folder of cut-outs, or leave it out.")
    wanted = set(VOC) if names == "full" else set(HOME)
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] in wanted]
    rows = [row for row in rows if row["kind"] == "whole" and row["licence"].startswith(PERMISSIVE)]
    rows = [row for row in rows if "-SA" not in row["licence"] and _objects(row) == objects]
    missing = wanted - {row["class"] for row in rows}
    if missing:
        names = ", ".join(sorted(missing))
        raise DiffuMaskError(f"{table} has no permissive {objects} cut-out of {names}: add one to it.")
    rows.sort(key=lambda row: (row["class"], row["path"]))
    return [
        Sprite(row["class"], row["model"], row["licence"], decode_picture(table.parent / row["path"]).convert("RGBA"))
        for row in rows
    ]


def _objects(row: dict[str, str]) -> str:
    if "objects" in row:
        return row["objects"]
    return "held-out" if hashlib.sha256(row["model"].encode()).digest()[0] < 51 else "kept"


class World:
    """Scenes of one list of cut-outs.

    Args:
        sprites: cut-outs as `load_sprites` gives them.
        size: side of the square pictures in pixels.
        two: share of the scenes with two objects of different classes.
    """

    def __init__(self, sprites: list[Sprite], size: int = 128, two: float = 1 / 3):
        self.size, self.two = size, two
        models: dict[str, dict[str, list[Sprite]]] = defaultdict(lambda: defaultdict(list))
        for sprite in sprites:
            models[sprite.name][sprite.model].append(sprite)
        self.models = {name: list(views.values()) for name, views in sorted(models.items())}
        self.classes = list(self.models)

    def scene(self, seed: int, index: int, classes: tuple[str, ...] | None = None) -> Scene:
        """Compose scene `index` of the world `seed`; with `classes`, of those classes, named from left to right."""
        rng = np.random.default_rng([seed, index])
        if classes is None:
            count = 2 if rng.random() < self.two else 1
            classes = tuple(self.classes[i] for i in rng.choice(len(self.classes), size=count, replace=False))
        home = HOME.get(classes[0], tuple(SCENES))
        at_home = rng.random() < 0.75
        place = str(rng.choice(home if at_home else list(SCENES)))
        canvas = BACKGROUNDS[place](rng, self.size)
        image = Image.fromarray(canvas)
        mask = np.zeros((self.size, self.size), np.uint8)
        used, sun = [], rng.uniform(-1, 1)
        apart = len(classes) == 1 or rng.random() < 0.65
        for slot, name in enumerate(classes):
            views = self.models[name][rng.integers(len(self.models[name]))]
            sprite = views[rng.integers(len(views))]
            used.append(sprite.model)
            image = self._paste(rng, image, mask, sprite, place, sun, self._span(slot, len(classes), apart))
        return Scene(_light(rng, image), mask, _caption(rng, classes, place), classes, place, tuple(used))

    def _span(self, slot: int, count: int, apart: bool) -> tuple[float, float]:
        """Return the columns that the object of a slot may take; those of two that are not apart overlap."""
        if count == 1:
            return 0, self.size
        low, high = ((0, 0.5), (0.5, 1))[slot] if apart else ((0.06, 0.56), (0.44, 0.94))[slot]
        return low * self.size, high * self.size

    def _paste(
        self,
        rng: np.random.Generator,
        image: Image.Image,
        mask: np.ndarray,
        sprite: Sprite,
        place: str,
        sun: float,
        span: tuple[float, float],
    ) -> Image.Image:
        size, (left, right) = self.size, span
        # Objects are alike in area, not in length: a train seen from the side must not vanish between latent cells.
        extent, longest = (rng.uniform(0.44, 0.68), 0.94) if right - left == size else (rng.uniform(0.34, 0.44), 0.5)
        w, h = sprite.image.size
        cut = _vary(rng, sprite.image, size * min(longest, extent * (max(w, h) / min(w, h)) ** 0.5), sun)
        w, h = cut.size
        middle, spread = (left + right - w) / 2, max((right - left - w) / 2, 0)
        x = int(round(np.clip(middle + spread * rng.uniform(-0.9, 0.9), 0, size - w)))
        y = int(round(rng.uniform(0.15 if place == "sky" else 0.4, 0.97) * (size - h)))
        if place != "sky" and rng.random() < 0.85:
            image = _shadow(rng, image, x, y, w, h, sun)
        image.paste(cut, (x, y), cut)
        alpha = np.asarray(cut)[..., 3]
        region = mask[y : y + h, x : x + w]
        region[alpha > 127] = VOC[sprite.name].id
        return image


def _caption(rng: np.random.Generator, classes: tuple[str, ...], place: str) -> str:
    names = " and ".join(article(VOC[name].phrase) for name in classes)
    draw = rng.random()
    if draw < 0.7:
        return f"a photo of {names} {SCENES[place]}"
    if draw < 0.8:
        return f"{names} {SCENES[place]}"
    return f"a photo of {names}" if draw < 0.9 else f"a picture of {names} {SCENES[place]}"


def _vary(rng: np.random.Generator, cut: Image.Image, side: float, sun: float) -> Image.Image:
    """Resize to `side` pixels, flip, turn, light and jitter the colours of a cut-out; trimmed to its alpha.

    The side that looks to the `sun` (-1 left, 1 right) and the top are brighter.
    """
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-8, 8)
    scale = side / max(cut.size)
    # Premultiplied, so that no colour hidden under alpha 0 bleeds into the edge.
    pixels = np.asarray(cut, np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    cut = Image.fromarray(pixels.round().astype(np.uint8))
    cut = cut.resize([max(8, round(edge * scale)) for edge in cut.size], Image.Resampling.BOX, reducing_gap=None)
    cut = cut.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    cut = cut.crop(cut.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    pixels = np.asarray(cut, np.float32).copy()
    colour = pixels[..., :3] / np.maximum(pixels[..., 3:] / 255, 1 / 255)
    colour = (colour - 128) * rng.uniform(0.9, 1.15) + 128 + rng.uniform(-12, 12)
    across, down = (np.linspace(-1, 1, edge, dtype=np.float32) for edge in (cut.size[0], cut.size[1]))
    colour = colour * (1 + rng.uniform(0, 0.2) * (0.6 * sun * across[None, :] - 0.5 * down[:, None]))[..., None]
    pixels[..., :3] = np.clip(colour * rng.uniform(0.93, 1.07, 3), 0, 255)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _shadow(rng: np.random.Generator, image: Image.Image, x: int, y: int, w: int, h: int, sun: float) -> Image.Image:
    """Darken the ground under an object: close to it, and softly away from the sun."""
    layer = Image.new("L", image.size, 0)
    draw, lift, lean = ImageDraw.Draw(layer), 0.1 * h, -0.25 * sun * w
    far = (x + 0.05 * w + min(lean, 0), y + h - lift, x + 0.95 * w + max(lean, 0), y + h + lift * 0.6)
    draw.ellipse(far, fill=int(rng.uniform(50, 100)))
    draw.ellipse((x + 0.1 * w, y + h - 0.5 * lift, x + 0.9 * w, y + h + 0.3 * lift), fill=int(rng.uniform(100, 150)))
    layer = layer.filter(ImageFilter.GaussianBlur(image.size[0] / 50))
    return Image.composite(Image.new("RGB", image.size, (12, 12, 16)), image, layer)


def _light(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float32)
    pixels = (pixels - 128) * rng.uniform(0.92, 1.08) + 128 + rng.uniform(-8, 8)
    return np.clip(pixels * rng.uniform(0.97, 1.03, 3), 0, 255).round().astype(np.uint8)


def main() -> None:
    """Write composed scenes as a dataset: `python -m diffumask_fast.mini.world OUT --num N --seed S`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assets", type=Path, help="folder of cut-outs; the packaged ones when left out")
    parser.add_argument("--list", choices=("small", "full"), default="small")
    parser.add_argument("--objects", choices=("kept", "held-out"), default="kept", help="seen by mini, or not")
    parser.add_argument("--shard-size", type=int, default=256)
    args = parser.parse_args()
    try:
        write_world(args.out, args.num, args.seed, args.assets, args.list, args.objects, args.shard_size)
    except DiffuMaskError as error:
        sys.exit(error.as_flags())


def write_world(
    out: Path,
    num: int,
    seed: int,
    assets: Path | None = None,
    names: str = "small",
    objects: str = "kept",
    shard_size: int = 256,
) -> None:
    """Write the first `num` scenes of world `seed` as a dataset; run again, it finishes what is missing.

    Raises:
        DiffuMaskError: no scenes are asked for, no usable cut-outs, or a folder that is closed or holds another run.
    """
    from diffumask_fast.dataset.run import open_run

    if num < 1 or seed < 0:
        raise DiffuMaskError("`num` must be at least 1 and `seed` at least 0.")
    world = World(load_sprites(assets, names, objects))

    def request(index: int, scene: Scene) -> Request:
        entries = [VOC[name] for name in scene.classes]
        phrases, ids = (tuple(getattr(entry, part) for entry in entries) for part in ("phrase", "id"))
        key = f"{'+'.join(scene.classes)}-{index:06d}"
        return Request(key, scene.prompt, "", phrases, ids, index, scene.classes)

    requests = [request(index, world.scene(seed, index)) for index in range(num)]
    environment = {library: metadata.version(library) for library in ("numpy", "pillow", "pyarrow")}
    options = {"world": names, "objects": objects, "seed": seed, "num": num, "sprites": _digest(world)}
    vocabulary = Vocabulary(tuple(VOC[name] for name in world.classes))
    with open_run(out, requests, options, environment, shard_size, vocabulary=vocabulary) as run:
        for index in run.missing_shards():
            drawn = [(request, world.scene(seed, request.seed)) for request in run.requests_of(index)]
            run.write(index, [_sample(request, scene) for request, scene in drawn])


def _sample(request: Request, scene: Scene) -> SimpleNamespace:
    exact = (1.0,) * len(scene.classes)
    return SimpleNamespace(
        request=request, image=scene.image, mask=scene.mask, quality=exact, maps=None, accepted=True, reason=""
    )


def _digest(world: World) -> str:
    """Return the SHA-256 of all cut-outs."""
    digest = hashlib.sha256()
    for views in (views for models in world.models.values() for views in models):
        for sprite in views:
            digest.update(f"{sprite.name} {sprite.model} {sprite.image.size}".encode() + sprite.image.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
