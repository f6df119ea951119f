"""A dataset's card, README.md: front matter that the Hugging Face hub reads, and what people want to know."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffumask_fast.dataset.licence import CARD, Licence
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.dataset.reader import Row, open_shard, read_manifest, read_rows, shard_paths
from diffumask_fast.dataset.schema import datasets_features
from diffumask_fast.dataset.storage import Place
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.prompts.class_entry import words_of

logger = logging.getLogger("diffumask_fast")

SEAL = b"\n<!-- diffumask-fast wrote this; sha256 of what is above: "
MOST_REASONS = 8
_STEPS = ((1000, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_MEANING = {
    "key": "unique name of the row",
    "image": "PNG, RGB",
    "mask": "PNG of one channel: class ids, 0 background, 255 to be ignored",
    "classes": "names of the objects asked for",
    "class_ids": "their values in the mask",
    "prompt": "what the image was drawn from",
    "negative_prompt": "what it was drawn away from",
    "seed": "of its noise",
    "quality": "a number in 0..1 for each class; higher is better",
    "maps": "the soft maps that the mask was made of, one class after another",
    "map_sizes": "height and width of each map",
    "accepted": "whether the image passed the checks",
    "reason": "why it did not",
    "augmentation": "how the row was made of others; empty for an original image",
    "sources": "the keys of those others",
}


@dataclass
class Figures:
    """What the rows of a dataset add up to, pictures aside.

    Args:
        columns: of its shards.
        words: name of a class -> all words that stand for it.
        drawn: whether its images are marked as drawn by a model.
    """

    columns: list[tuple[str, pa.DataType]]
    words: Mapping[str, Sequence[str]]
    drawn: bool
    rows: int = 0
    accepted: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    ids: dict[str, int] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        self.accepted += row.accepted
        for name, number in zip(row.classes, row.class_ids, strict=True):
            self.ids[name] = number
            self.asked[name] += 1
            self.passed[name] += row.accepted
        for name, quality in zip(row.classes, row.quality, strict=False):
            self.quality[name] = self.quality.get(name, 0.0) + quality
        if not row.accepted:
            names = [*row.classes, *(word for name in row.classes for word in self.words.get(name, ()))]
            self.reasons[kind_of(row.reason, names)] += 1


def write_card(folder: Place, licence: Licence, tag: str = "") -> None:
    """Write a dataset's README.md; one that is another's, or that somebody has changed, is left as it is.

    Equal datasets have equal cards, wherever and whenever they are written.

    Args:
        folder: of the finished dataset.
        licence: of the model that drew it.
        tag: as for `temporary_path`.

    Raises:
        DiffuMaskError: the dataset cannot be read, or the card not be written.
    """
    path = folder / CARD
    if not _is_ours(path):
        logger.warning("%s is there and is not as this program wrote it: it is left, and no card is written", path)
        return
    data = "".join(f"{line}\n" for line in _lines(folder, licence)).encode()
    write_file(path, data + SEAL + _seal(data), tag)


def kind_of(reason: str, names: Iterable[str] = ()) -> str:
    """Return what reasons of one kind have in common: names of classes and numbers are left out.

    Example:
        >>> kind_of("dog covers 0.31% of the image, less than 0.50%", ["dog"])
        '… covers … of the image, less than …'
    """
    for name in sorted(names, key=len, reverse=True):
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", reason)
    return re.sub(r"\d+(\.\d+)?%?", "…", reason)


def _is_ours(path: Place) -> bool:
    """Tell whether a card may be written at a path: nothing is there, or a card of ours that nobody has changed."""
    if isinstance(path, Path) and path.is_symlink():
        return False
    if not path.exists():
        return True
    try:
        data, _, seal = path.read_bytes().rpartition(SEAL) if path.is_file() else (b"", b"", b"")
    except OSError:
        return False
    return seal == _seal(data)


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b" -->\n"


def _lines(folder: Place, licence: Licence) -> Iterator[str]:
    manifest = read_manifest(folder)
    figures = _figures(folder, manifest)
    title = f"{figures.rows:,} images with masks of {_counted(len(figures.asked), 'class', 'classes')}"
    yield "---"
    yield from _front_matter(figures, title, licence)
    yield "---"
    yield f"\n# {title}\n"
    yield from _origin(manifest, figures, licence)
    yield from _classes(figures)
    yield from _making(manifest)
    yield from _use(figures)


def _figures(folder: Place, manifest: dict[str, Any]) -> Figures:
    with open_shard(shard_paths(folder)[0]) as file:
        columns = list(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    first = next(read_rows(folder, accepted_only=False, columns=["image"]))
    figures = Figures(columns, words_of(manifest["classes"]), is_drawn(first.values["image"]["bytes"] or b""))
    wanted = ["classes", "class_ids", "quality", "accepted", "reason"]
    for row in read_rows(folder, accepted_only=False, columns=wanted):
        figures.add(row)
    return figures


def _front_matter(figures: Figures, title: str, licence: Licence) -> Iterator[str]:
    """Yield YAML; texts are quoted as JSON, which YAML reads."""
    for name, value in licence._asdict().items():
        if value:
            yield f"{name}: {json.dumps(value)}"
    yield f"pretty_name: {json.dumps(title)}"
    yield from ("task_categories:", "- image-segmentation", "task_ids:", "- semantic-segmentation")
    yield from ("size_categories:", f"- {next((name for most, name in _STEPS if figures.rows < most), 'n>10M')}")
    yield from ("tags:", *(["- synthetic"] if figures.drawn else []), "- diffumask-fast")
    yield from ("configs:", "- config_name: default", "  data_files:", "  - split: train")
    yield from ("    path: data/shard-*.parquet", "dataset_info:", "  features:")
    for name, note in datasets_features(figures.columns).items():
        yield f"  - {json.dumps({'name': name, **_feature(note)})}"


def _feature(note: Mapping[str, Any]) -> dict[str, Any]:
    if note["_type"] == "Sequence":
        inner = _feature(note["feature"])
        return {"sequence": inner.get("dtype", inner)}
    return {"dtype": note.get("dtype", "image")}


def _origin(manifest: dict[str, Any], figures: Figures, licence: Licence) -> Iterator[str]:
    all_of_them = figures.accepted == figures.rows
    rest = "." if all_of_them else "; the rejected ones are kept, with the reason in `reason`."
    yield f"{'All' if all_of_them else f'{figures.accepted:,}'} of them are accepted{rest}\n"
    model = manifest["model"]
    if not model.get("id"):
        yield "No model of this program drew the images; `dataset.json` says how they came here. Their licence is"
        yield "unknown: see where they come from.\n"
        return
    yield "**All of it is synthetic.** A model drew the images from text prompts, and the masks are made of its"
    yield "cross-attention: nothing was photographed, and nothing labelled by hand. Masks are as good as the model's"
    yield "attention, and its biases are those of the images."
    if figures.drawn:
        yield "Each image says so itself: the XMP of its PNG has IPTC's `DigitalSourceType` `trainedAlgorithmicMedia`."
    known = f"{_code(str(licence))}, as its card says" if licence.license != "unknown" else "unknown: see the model"
    facts = {
        "name": _code(str(model["id"])),
        "revision": _code(str(manifest["options"].get("revision") or "")),
        "SHA-256 of its weights": _code(str(model.get("weights") or "")),
        "licence": known,
    }
    yield "\n| the model | |\n|---|---|"
    yield from (f"| {name} | {value} |" for name, value in facts.items() if value)
    yield from (f"| LoRA in it | {lora} |" for lora in _loras(manifest["options"]))
    yield "\nThe licence in the head of this file is the model's: who publishes the data decides on theirs within it.\n"


def _loras(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the LoRA files that were fused into the model, whose licences nobody has told."""
    for text in options.get("lora", ()):
        name, _, scale = str(text).rpartition(":")
        digest = str(options.get("lora_sha256", {}).get(name, "unknown"))
        yield f"{_code(name)}, scale {_plain(scale)}, SHA-256 {_code(digest)}, licence unknown: see where it is from"


def _classes(figures: Figures) -> Iterator[str]:
    yield "## Classes\n\n| id | class | images | accepted | mean quality |\n|---|---|---|---|---|"
    for name in sorted(figures.asked, key=lambda name: (figures.ids[name], name)):
        asked, passed = figures.asked[name], figures.passed[name]
        quality = f"{figures.quality[name] / asked:.3f}" if name in figures.quality else "-"
        yield f"| {figures.ids[name]} | {_plain(name)} | {asked:,} | {passed:,} ({passed / asked:.0%}) | {quality} |"
    if figures.reasons:
        yield "\n| rejected because | images |\n|---|---|"
        common = sorted(figures.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        for reason, count in common[:MOST_REASONS]:
            yield f"| {_plain(reason)} | {count:,} |"
        if rest := sum(count for _, count in common[MOST_REASONS:]):
            yield f"| other reasons | {rest:,} |"


def _making(manifest: dict[str, Any]) -> Iterator[str]:
    version = _plain(str(manifest["environment"].get("diffumask_fast") or ""))
    yield f"\n## How it was made\n\nBy diffumask-fast {version}".rstrip() + ", with these options:\n"
    yield "| option | |\n|---|---|"
    for name, value in flat(manifest["options"]):
        text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
        yield f"| {_plain(name)} | {_plain(text)} |"


def _use(figures: Figures) -> Iterator[str]:
    yield "\n## Columns\n\n| column | |\n|---|---|"
    yield from (f"| `{name}` | {_MEANING[name]} |" for name, _ in figures.columns)
    yield "\n## Use\n\n```python\nfrom datasets import load_dataset\n"
    yield 'data = load_dataset("OWNER/NAME", split="train")  # or this folder'
    yield 'data = data.filter(lambda accepted: accepted, input_columns="accepted")\n```\n'
    yield "To publish it, in this folder: `hf upload OWNER/NAME . --repo-type dataset`"


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values of options; names of nested ones are joined by dots."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _code(text: str) -> str:
    return f"<code>{_plain(text)}</code>" if text else ""


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one line and one cell of a table."""
    line = " ".join(text.split())
    line = line if len(line) <= 300 else line[:297] + "..."
    return re.sub(r"([\\`*_{}\[\]<>|#!~$&])", r"\\\1", line)
