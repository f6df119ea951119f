"""The paper's program's folder of one class: what its next scripts read, and what resuming needs."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffumask_fast.dataset.folder import differences, lock
from diffumask_fast.dataset.writer import make_folder, temporary_path, write_file
from diffumask_fast.dropin.class_maps import SIDE
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import check_no_link, check_own

if TYPE_CHECKING:
    from diffumask_fast.dropin.drawing import Drawing

HEAD = 350  # bytes that all our .npy have in common


def pack_maps(maps: Mapping[int, np.ndarray]) -> bytes:
    """Return the bytes of that program's .npy: a pickled dictionary {0 to 19: float32 [512, 512]}.

    Classes without a map share one array of zeros, which the pickle holds once: 2 MB instead of 21. It names NumPy's
    old module, so that NumPy 1.22, which that program pins, reads it as well as NumPy 2.

    Args:
        maps: class index -> [512, 512].
    """
    zeros = np.zeros((SIDE, SIDE), np.float32)
    every = {index: np.ascontiguousarray(maps.get(index, zeros), np.float32) for index in range(20)}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    pickled = pickle.dumps(np.array(every, dtype=object), protocol=3)
    stream.write(pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))
    return stream.getvalue()


@functools.cache
def packed_size(num_maps: int) -> int:
    """Return how long pack_maps' bytes are for a number of maps."""
    return len(pack_maps({index: np.empty((SIDE, SIDE), np.float32) for index in range(num_maps)}))


@functools.cache
def packed_head() -> bytes:
    """Return what pack_maps' bytes begin with, whatever the maps."""
    return pack_maps({})[:HEAD]


class ClassFolder:
    """That program's folder of one class; a file in it is there whole or not at all, and each .jpg has its .npy.

    What this program did not write in it is never replaced, and links are not followed.

    Args:
        output: the folder above.
        class_name: one of VOC's.
        image_number: as asked for; part of the name.
        settings: what the images depend on besides prompt and seed; kept as a comment in each .jpg.
    """

    def __init__(self, output: Path, class_name: str, image_number: int, settings: dict[str, Any]):
        self.path = output / f"VOC_Multi_Attention_{class_name}_sub_{image_number}_NoClipRetrieval_sample"
        self.settings = settings

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, or take the one that is there, and keep other processes from writing in it.

        Raises:
            DiffuMaskError: it cannot be written, is in use, or is a link.
        """
        check_no_link(self.path)
        for name in ("train_image", "npy"):
            check_no_link(self.path / name)
            make_folder(self.path / name)
        descriptor = lock(self.path)
        try:
            yield
        finally:
            os.close(descriptor)

    def missing(self, drawings: Sequence[Drawing]) -> list[Drawing]:
        """Return the drawings that are still to be drawn, and remove what a killed run left half-written.

        Args:
            drawings: all that belong into the folder.

        Raises:
            DiffuMaskError: it holds images that were drawn otherwise, or files of another program.
        """
        for name in ("image_*.jpg", "image_*.npy", "prompts.jsonl"):
            for path in self.path.glob(str(temporary_path(Path(name)))):
                path.unlink()
        strange = {path.stem for path in self.path.glob("train_image/*.jpg")} - {drawing.stem for drawing in drawings}
        if strange:
            raise DiffuMaskError(
                f"{self.path} holds {min(strange)}.jpg, which has no place among these numbers: give the `thread_num` "
                "that it was begun with, or another `output`"
            )
        return [drawing for drawing in drawings if not self._has(drawing)]

    def write(self, drawing: Drawing, image: Image.Image, maps: Mapping[int, np.ndarray]) -> None:
        """Write one image and its maps; the .jpg comes last."""
        stream = io.BytesIO()
        image.save(stream, "JPEG", comment=self._provenance(drawing))
        for folder, ending, data in (("npy", "npy", pack_maps(maps)), ("train_image", "jpg", stream.getbuffer())):
            name = f"{drawing.stem}.{ending}"
            write_file(self.path / folder / name, data, temporary=self.path / f".{name}.tmp")

    def record(self, drawings: Sequence[Drawing]) -> None:
        """Write prompts.jsonl: prompt, seed and settings of every image that belongs into the folder.

        Raises:
            DiffuMaskError: there is one of another program, or it cannot be written.
        """
        path = self.path / "prompts.jsonl"
        check_own(path, '{"image": "image_')
        data = b"".join(self._provenance(drawing) + b"\n" for drawing in drawings)
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)

    def _provenance(self, drawing: Drawing) -> bytes:
        own = {"image": drawing.stem, "class": drawing.class_name, "prompt": drawing.prompt, "seed": drawing.seed}
        return json.dumps(own | self.settings).encode()

    def _has(self, drawing: Drawing) -> bool:
        image, maps = (
            self.path / folder / f"{drawing.stem}.{ending}"
            for folder, ending in (("train_image", "jpg"), ("npy", "npy"))
        )
        size = packed_size(len(drawing.tokens))
        head, there = _head(maps), maps.stat().st_size if maps.exists() else 0
        if head != packed_head()[: len(head)] or there > size:
            raise DiffuMaskError(f"{maps} was not written by this program: move it away, or give another `output`")
        if not _head(image):
            return False
        data = image.read_bytes()
        if (comment := self._provenance(drawing)) not in data[:65536]:
            match = re.search(rb'\{"image": .*?\}', data[:65536])
            old, new = json.loads(match[0]) if match else {}, json.loads(comment)
            changes = [f"{name} {change}" for name, change in differences(old, new)]
            why = f"with other settings: {', '.join(changes)[:300]}" if old else "by another program"
            raise DiffuMaskError(f"{image} was drawn {why}; give the old settings, or another `output`")
        return data.endswith(b"\xff\xd9") and there == size  # neither was cut off by whatever copied it


def _head(path: Path) -> bytes:
    """Return the first bytes of a file, none where nothing is.

    Raises:
        DiffuMaskError: there is a link, or what is no file.
    """
    check_no_link(path)
    if not path.exists():
        return b""
    if not path.is_file():
        raise DiffuMaskError(f"{path} is no file: move it away, or give another `output`")
    with path.open("rb") as file:
        return file.read(HEAD)
