"""A class that draws, for other people's Ray Data pipelines; `generate --ray` is in `cluster.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.dataset.schema import SCHEMA, make_row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.loading import quietly
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.planner import Plan, Recipe
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary


class Drawer:
    """Draw an image and a mask for each row of a batch: what `map_batches` takes.

    A row says what to draw by `class`, a name or several, for which a caption is made; or by `prompt` and `phrases`,
    the words in it whose objects are wanted. `seed` is that of the image. `key` and `negative_prompt` may be there. The
    rows that come out have the columns of a shard, those whose masks are rejected among them.

    Args:
        model: as `DiffuMaskPipeline.from_pretrained` takes it.
        classes: all that rows may name, as `--classes` takes them, so that each has one id in all batches; None is all
            that the model lists, else VOC's.
        batch_size: images that are drawn at once, or "auto".
        maps: how maps are made.
        mask: how masks are made of maps.
        loading: what else `from_pretrained` takes: device, dtype, engine, engine_path, revision.
        kwargs: what `DiffuMaskPipeline.stream` takes: num_inference_steps, guidance_scale, height, width.

    Raises:
        DiffuMaskError: the model cannot be loaded; or later, a row names an unknown class or lacks a column.

    Example:
        >>> import numpy as np
        >>> draw = Drawer(loading={"device": "cpu"}, num_inference_steps=2)
        >>> draw({"class": np.array(["dog"]), "seed": np.array([7])}).column("key").to_pylist()
        ['dog-000007']
    """

    def __init__(
        self,
        model: str | Path = "mini",
        *,
        classes: str | None = None,
        batch_size: int | str = "auto",
        maps: MapOptions | None = None,
        mask: MaskOptions | None = None,
        loading: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        with quietly():
            self._pipe = DiffuMaskPipeline.from_pretrained(model, **(loading or {}))
        info = self._pipe.info
        known = Vocabulary.named(info.classes) if info.classes else None
        entries = Vocabulary.parse(classes, known, str(model)).entries
        self._entries = {name: entry for entry in entries for name in (*entry.phrases, entry.name)}
        self._options = {"batch_size": batch_size, "maps": maps, "mask": mask, **kwargs}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Draw the rows of a batch.

        Args:
            batch: column -> values, as numpy arrays or lists.

        Returns:
            A row for each, in their order, with the columns of a shard.
        """
        requests = list(self._requests(batch))
        with quietly():
            rows = [make_row(result) for result in self._pipe.stream(requests, **self._options)]
        return pa.Table.from_pylist(rows, SCHEMA)

    def _requests(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Request]:
        by_class = "class" in batch
        if missing := [name for name in ("seed", *([] if by_class else ["prompt", "phrases"])) if name not in batch]:
            raise DiffuMaskError(f"rows have no column {missing[0]}: give class and seed, or prompt, phrases and seed")
        for number, seed in enumerate(map(int, batch["seed"])):
            row = {name: values[number] for name, values in batch.items()}
            given = row["class"] if by_class else row["phrases"]
            words = [given] if isinstance(given, str) else [str(word) for word in given]
            entries = self._named(words)
            made = self._planned(entries, seed) if by_class else None
            yield Request(
                key=str(row.get("key", f"{'+'.join(entry.stem for entry in entries)}-{seed:06d}")),
                prompt=made.prompt if made else str(row["prompt"]),
                negative_prompt=str(row.get("negative_prompt", "")),
                phrases=made.phrases if made else tuple(words),
                class_ids=tuple(entry.id for entry in entries),
                seed=seed,
                classes=tuple(entry.name for entry in entries),
            )

    def _named(self, words: Sequence[str]) -> list[ClassEntry]:
        """Return the classes of names or phrases."""
        unknown = [word for word in words if word not in self._entries]
        if unknown or not words:
            known = ", ".join(dict.fromkeys(entry.name for entry in self._entries.values()))
            raise DiffuMaskError(
                f"no class {', '.join(unknown) or 'is named'}: name it in `classes`, which are {known}"
            )
        return [self._entries[word] for word in words]

    def _planned(self, entries: Sequence[ClassEntry], seed: int) -> Request:
        """Return a request whose caption is a function of classes and seed."""
        return Plan(Recipe(Vocabulary(tuple(entries)), 1, seed, len(entries), scenes=self._pipe.info.scenes))[0]
