"""A dataset with all that formats stumble over: holes, parts, an ignored band, sizes, a class name with a space."""

from pathlib import Path

import numpy as np
from PIL import Image
from samples import Drawn

from diffumask_fast.convert.convert import convert
from diffumask_fast.convert.options import ConvertOptions, ImportOptions
from diffumask_fast.dataset.reader import Row, read_rows
from diffumask_fast.dataset.run import open_run
from diffumask_fast.prompts.request import Request

CLASSES = {12: "dog", 21: "traffic light"}
VOC_CLASSES = {12: "dog", 9: "chair"}
SIZES = ((24, 40), (37, 29), (30, 30))
REJECTED = 4


def drawn(index: int, classes: dict[int, str] = CLASSES) -> Drawn:
    """An object with a hole, one in two parts, and a band around the first that is ignored."""
    rng = np.random.default_rng(index)
    height, width = SIZES[index % 3]
    prompt = f"a photo of {' and '.join(classes.values())}, number {index // 2}"
    names = tuple(classes.values())
    request = Request(f"{names[0]}+{names[1].replace(' ', '-')}-{index:06d}", prompt, "", names, tuple(classes), index)
    first, second = classes
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    middle, radius = rng.integers(9, 14, 2), rng.integers(6, 9)
    distance = np.hypot(y - middle[0], x - middle[1])
    mask[distance < radius] = first
    mask[distance < radius - 3] = 0
    mask[(distance >= radius) & (distance < radius + 1.5)] = 255
    mask[-4:, : width // 3], mask[-6:, -3:] = second, second
    mask[-3, 2] = 0
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    maps = np.stack([_small(mask == class_id) for class_id in classes])
    accepted = index != REJECTED
    return Drawn(request, image, mask, [0.5, 0.25], maps, accepted, "" if accepted else "too small", drawn=True)


def _small(pixels: np.ndarray) -> np.ndarray:
    """Return pixels [H, W] bool as a map [8, 8] uint8 of maximum 255."""
    small = np.array(Image.fromarray(pixels).convert("F").resize((8, 8), Image.Resampling.BOX))
    return np.round(small / small.max() * 255).astype(np.uint8)


def dataset(folder: Path, num: int = 12, classes: dict[int, str] = CLASSES) -> Path:
    samples = [drawn(index, classes) for index in range(num)]
    with open_run(folder, [sample.request for sample in samples], {"seed": 0}, {}, 5) as run:
        for index in run.missing_shards():
            run.write(index, samples[5 * index : 5 * index + 5])
    return folder


def rows_by_name(folder: Path) -> dict[str, Row]:
    """Return the accepted rows by the names of their files."""
    return {row.key: row for row in read_rows(folder)}


def converted(source: Path, out: Path, to: str, **options) -> Path:
    convert(ConvertOptions(source, out, to, **{"image_format": "png", "workers": 1} | options))
    return out


def killed_conversion(source: Path, out: Path) -> None:
    """Called in a process of its own, which dies."""
    converted(source, out, "coco", val=0.3)


def killed_lance(source: Path, out: Path) -> None:
    """Called in a process of its own, which dies."""
    converted(source, out, "lance", val=0.3)


def fill(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon by the rule of cv2.fillPoly: what is inside by the even-odd rule, and its edges."""
    y, x = np.mgrid[:height, :width]
    inside, edges = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        assert min(abs(x1 - x0), abs(y1 - y0)) in (0, steps)  # straight or diagonal: no doubt which pixels it crosses
        for step in range(steps + 1):
            edges[y0 + np.sign(y1 - y0) * step, x0 + np.sign(x1 - x0) * step] = True
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside | edges


def killed_import(source: Path, out: Path) -> None:
    """Called in a process of its own, which dies."""
    from diffumask_fast.convert.import_folder import import_folder  # it loads torch, which processes here do without

    import_folder(ImportOptions(source, out, "voc", shard_size=4))
