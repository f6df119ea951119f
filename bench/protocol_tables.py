"""Tables and plot of the paper's protocol, made of the rows of `bench/reproduce.py`, with the paper's figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffumask_fast.bench.protocol import DEFAULT, UNSEEN

NONE_YET = "No rows yet: `make reproduce` measures them."
DASH = "–"
Rows = Mapping[str, Mapping[int, dict[str, Any]]]  # name of the cell -> seed -> row

# cell -> what it is trained on, and what the paper has for it (table 1, VOC 2012: images, R50, Swin-B)
HEADLINE = {
    "headline/real": ("real scenes", "11.5k: 77.3, 84.3"),
    "headline/fifth": ("a fifth of them", "5.0k: –, 83.4"),
    "headline/synthetic": ("synthetic images", "60k: 57.4, 70.6"),
    "headline/synthetic-then-fifth": ("synthetic images, then a fifth of the real scenes", "60k, 5.0k: 77.6, 84.9"),
    "headline/oracle-masks": ("synthetic images with the oracle's masks", DASH),
}
# title -> cell -> what it is, and the paper's mean of bird and dog (table 5, Swin-B)
ABLATIONS = {
    "masks": {
        DEFAULT: ("Otsu's threshold (default)", DASH),
        "masks/affinity": ("AffinityNet's map", "81.6"),
        "masks/adaptive-affinity": ("adaptive threshold, by AffinityNet's map", "89.5"),
        "masks/adaptive": ("adaptive threshold, by the attention map", DASH),
        "masks/0.35": ("threshold 0.35", DASH),
        "masks/0.45": ("threshold 0.45", "0.4: 85.3"),
        "masks/0.55": ("threshold 0.55", "0.5: 78.9, 0.6: 44.4"),
    },
    "pruning": {
        DEFAULT: ("nothing is pruned (default)", DASH),
        "pruning/0.3": ("alpha 0.3", "83.2"),
        "pruning/0.5": ("alpha 0.5", "88.2"),
        "pruning/0.7": ("alpha 0.7", "89.5"),
    },
    "augmentation": {
        "augmentation/none": ("none", "84.3"),
        "augmentation/splice": ("splicing alone", "87.0"),
        "augmentation/blur": ("blur alone", "with the one above 87.9"),
        "augmentation/occlude": ("occlusion alone", "with those above 88.2"),
        "augmentation/perspective": ("perspective alone", DASH),
        DEFAULT: ("all four (default)", "89.5"),
    },
}
# cell -> what it is trained on, and the paper's seen, unseen, harmonic mean (Swin-B)
ZERO_SHOT = {
    "zero-shot/real": ("real scenes without the five", DASH),
    "headline/synthetic": ("synthetic images", "71.4, 65.0, 68.1"),
    "zero-shot/synthetic-then-real": ("synthetic images, then real scenes without the five", DASH),
    "zero-shot/real-then-synthetic": ("real scenes without the five, then synthetic images", DASH),
}
# The 13 classes that the paper prints (Swin-B): real, DiffuMask, DiffuMask and real.
PAPER = {
    "aeroplane": (97.0, 90.8, 95.6), "bird": (93.7, 92.9, 94.4), "boat": (71.5, 67.4, 72.3), "bus": (91.7, 88.3, 96.9),
    "car": (89.6, 82.9, 92.9), "cat": (96.5, 92.5, 96.6), "chair": (57.5, 27.2, 51.5), "cow": (95.9, 92.2, 96.7),
    "dog": (96.8, 86.0, 95.5), "horse": (94.4, 89.0, 96.1), "person": (92.5, 76.5, 91.5), "sheep": (95.1, 92.2, 96.4),
    "sofa": (65.6, 49.8, 70.2),
}  # fmt: skip
PER_CLASS = ("headline/real", "headline/synthetic", "headline/synthetic-then-fifth")


def by_cell(rows: Sequence[dict[str, Any]]) -> Rows:
    """Return rows by the name of their cell and their seed; of several the last."""
    cells: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for one in rows:
        cells[one["name"]][one["config"]["seed"]] = one
    return cells


def all_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return what is found and all tables, in Markdown; IoU in percent."""
    if not rows:
        return NONE_YET
    cells = by_cell(rows)
    parts = [_headline(cells), _findings(cells), _per_class(cells)]
    parts += [_ablation(title, lines, cells) for title, lines in ABLATIONS.items()]
    return "\n\n".join(filter(None, [*parts, _zero_shot(cells), _conditions(rows)]))


def _values(cells: Rows, name: str, of: str = "miou", objects: str = "kept") -> dict[int, float]:
    """Return a figure of each seed in percent: one of a test, or the IoU of one of its classes, where it is there."""
    tests = {seed: one["config"]["tests"][objects] for seed, one in cells.get(name, {}).items()}
    figures = {seed: (test | test["per_class_iou"])[of] for seed, test in tests.items()}
    return {seed: 100 * value for seed, value in figures.items() if value is not None}


def _spread(values: Mapping[int, float], signed: bool = False) -> str:
    """Write the mean of the seeds' figures, with the lowest and the highest."""
    if not values:
        return DASH
    sign = "+" if signed else ""
    mean, low, high = (format(value, f"{sign}.1f") for value in (_mean(values), *_ends(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def _ends(values: Mapping[int, float]) -> tuple[float, float]:
    return min(values.values()), max(values.values())


def _less(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Return the differences of the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def _table(*rows: Sequence[str]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _images(cells: Rows, name: str) -> str:
    counts = {one["config"]["images"] for one in cells.get(name, {}).values()}
    return DASH if not counts else str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _headline(cells: Rows) -> str:
    lines = [
        (
            label, _images(cells, name), _spread(_values(cells, name)),
            _spread(_values(cells, name, objects="held-out")), paper,
        )
        for name, (label, paper) in HEADLINE.items()
    ]  # fmt: skip
    head = ("trained on", "images", "mIoU, new scenes", "mIoU, scenes of other objects", "the paper, VOC: R50, Swin-B")
    return _table(head, *lines)


def _findings(cells: Rows) -> str:
    """Return sentences: how far apart segmenters are, and what of the gap is masks."""
    real, ours, both, oracle = (
        _values(cells, f"headline/{name}") for name in ("real", "synthetic", "synthetic-then-fifth", "oracle-masks")
    )
    sentences = []
    if gap := _less(ours, real):
        sentences.append(f"Synthetic over real: {_spread(gap, True)} points of mIoU.")
        classes = {name: _mean(differences) for name, differences in _class_gaps(cells).items() if differences}
        best, worst = max(classes, key=lambda name: classes[name]), min(classes, key=lambda name: classes[name])
        sentences.append(f"Best class: {best}, {classes[best]:+.1f}; worst: {worst}, {classes[worst]:+.1f}.")
    if gain := _less(both, real):
        sentences.append(f"Synthetic, then a fifth of the real, over all the real: {_spread(gain, True)}.")
    masks, images = _less(oracle, ours), _less(real, oracle)
    if masks and images:
        sentences.append(
            f"Of the gap to real, the masks are {_spread(masks, True)} (the oracle's masks over ours, same images), "
            f"the images {_spread(images, True)} (real over synthetic images with the oracle's masks)."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _class_gaps(cells: Rows) -> dict[str, dict[int, float]]:
    """Return for each class by how much the synthetic segmenters are better than the real ones."""
    first = next(iter(cells["headline/real"].values()))
    names = first["config"]["tests"]["kept"]["per_class_iou"]
    return {
        name: _less(*(_values(cells, f"headline/{data}", name) for data in ("synthetic", "real"))) for name in names
    }


def _per_class(cells: Rows) -> str:
    if not all(cells.get(name) for name in PER_CLASS):
        return ""
    lines = []
    for name, gaps in _class_gaps(cells).items():
        ious = [_values(cells, cell, name) for cell in PER_CLASS]
        own = [f"{_mean(one):.1f}" if one else DASH for one in ious]
        paper = [f"{value:.1f}" for value in PAPER[name]] if name in PAPER else [DASH] * 3
        lines.append((name, *own, _spread(gaps, True), *paper))
    columns = ("real", "synthetic", "synthetic, then fifth", "synthetic over real")
    return _table(("IoU, new scenes", *columns, "paper, Swin-B: real", "DiffuMask", "DiffuMask, then real"), *lines)


def _ablation(title: str, rows: Mapping[str, tuple[str, str]], cells: Rows) -> str:
    if not any(cells.get(name) for name in rows if name != DEFAULT):
        return ""
    default, lines = _values(cells, DEFAULT), []
    for name, (label, paper) in rows.items():
        values = _values(cells, name)
        over = DASH if name == DEFAULT else _spread(_less(values, default), True)
        ious = {
            seed: 100 * one["config"]["masks_iou"]
            for seed, one in cells.get(name, {}).items()
            if one["config"]["masks_iou"] is not None
        }
        lines.append((label, _images(cells, name), _spread(ious), _spread(values), over, paper))
    columns = ("images", "IoU of the masks with the oracle's", "mIoU, new scenes", "over the default")
    return _table((title, *columns, "the paper, bird and dog"), *lines)


def _zero_shot(cells: Rows) -> str:
    if not any(cells.get(name) for name in ZERO_SHOT if name.startswith("zero-shot")):
        return ""
    names = ("seen_miou", "unseen_miou", "harmonic_mean")
    lines = [
        (label, *(_spread(_values(cells, name, of)) for of in names), paper)
        for name, (label, paper) in ZERO_SHOT.items()
    ]
    return _table(("zero-shot", "seen", "unseen", "harmonic mean", "the paper, Swin-B"), *lines)


def _conditions(rows: Sequence[dict[str, Any]]) -> str:
    config, seeds = rows[-1]["config"], {one["config"]["seed"] for one in rows}
    scale = config["scale"]
    commits = sorted({one["config"]["commit"] or "unknown" for one in rows})
    return (
        f"{len(rows)} segmenters, {len(seeds)} seed{'s' * (len(seeds) > 1)}; mean (lowest to highest). "
        f"{scale['images']} images, {scale['tests']} scenes in a test; {scale['steps']} steps (headline, zero-shot), "
        f"{scale['finetune_steps']} when going on, {scale['ablation_steps']} (the other tables), "
        f"{scale['fold_steps']} in each fold; {config['dtype']}. Unseen: {', '.join(UNSEEN)}. {config['cpu']}, "
        f"{config['threads']} thread{'s' * (config['threads'] > 1)}, torch {config['torch']}, commit "
        f"{', '.join(commits)}."
    )


def plot(rows: Sequence[dict[str, Any]], path: Path, digest: str) -> None:
    """Draw the headline and what the ablations change, a dot for each seed, and write the rows' digest into the file.

    Raises:
        DiffuMaskError: matplotlib is not installed.
    """
    from diffumask_fast.bench.plots import needs_matplotlib

    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = by_cell(rows)
    drawing = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(drawing)
    above, below = drawing.subplots(2, 1, height_ratios=(2, 3))
    labels = [label for label, _ in HEADLINE.values()]
    for shift, objects, words in ((-0.2, "kept", "new scenes"), (0.2, "held-out", "scenes of other objects")):
        _bars(above, labels, [_values(cells, name, objects=objects) for name in HEADLINE], shift, 0.38, words)
    above.set(xlabel="mIoU, %", xlim=(0, None))
    above.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    default = _values(cells, DEFAULT)
    lines = {
        f"{title}: {label}": _less(_values(cells, name), default)
        for title, names in ABLATIONS.items()
        for name, (label, _) in names.items()
        if name != DEFAULT
    }
    _bars(below, list(lines), list(lines.values()), 0, 0.6, None)
    below.axvline(0, color="black", linewidth=0.8)
    below.set(xlabel="points of mIoU over the default (Otsu, nothing pruned, all four), new scenes")
    drawing.savefig(path, dpi=100, metadata={"rows": digest})


def _bars(
    axes: Any, labels: Sequence[str], values: Sequence[Mapping[int, float]], shift: float, height: float,
    words: str | None,
) -> None:  # fmt: skip
    places = [place + shift for place in range(len(labels))]
    axes.barh(places, [_mean(one) if one else 0 for one in values], height=height, label=words, alpha=0.6)
    for place, one in zip(places, values, strict=True):
        axes.plot(list(one.values()), [place] * len(one), "k.", markersize=4)
    axes.set_yticks(range(len(labels)), labels)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
