"""The paper's program's command line and layout, on our engine; docs/from-diffumask.md says what differs, and why."""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.attention.store import over_maximum
from diffumask_fast.dataset.folder import differences, lock
from diffumask_fast.dataset.writer import make_folder, write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.decoding import timed_decoding
from diffumask_fast.options import checked, number, whole
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import ClassEntry, Vocabulary

logger = logging.getLogger("diffumask_fast")
SIDE = 512
FIRST_SEED = 200_000
STEPS, GUIDANCE = 50, 7.0
# the words whose tokens count for a class; its name where nothing is listed
WORDS = {
    "aeroplane": ("aerop", "lane"),
    "diningtable": ("table",),
    "person": ("arm", "person", "man", "woman", "child", "boy", "girl", "teenager"),
    "pottedplant": ("pot", "ted", "plant"),
    "tvmonitor": ("tv", "monitor"),
}
COARSEST_ALONE = ("sofa", "train", "tvmonitor")


@dataclass(frozen=True)
class Drawing:
    """One image to draw: its seed names it, its prompt's tokens of each class (index 0 to 19) give its maps."""

    class_name: str
    seed: int
    prompt: str
    tokens: dict[int, list[int]]

    @property
    def stem(self) -> str:
        """The file name without its ending; that program counts on before it saves."""
        return f"image_{self.class_name}_{self.seed + 1}"


def image_seeds(image_number: int, thread_num: int) -> list[int]:
    """Return the seeds of N images (at least 1), as that program's w workers (at least 1) share them.

    Worker i of w begins at 200000 + 2i(N // w) and draws N // w images. The N % w that it never draws are one more
    for each of the first workers, with numbers that it leaves free; of more workers than images the surplus rests.

    Example:
        >>> image_seeds(5, 2)
        [200000, 200001, 200002, 200004, 200005]
    """
    workers = min(thread_num, image_number)
    share, rest = divmod(image_number, workers)
    firsts = [FIRST_SEED + 2 * worker * share for worker in range(workers)]
    return [first + i for worker, first in enumerate(firsts) for i in range(share + (worker < rest))]


def word_tokens(tokenizer: Any, prompt: str) -> dict[int, list[int]]:
    """Find the tokens of every VOC class in a prompt.

    A token counts when it, decoded alone, is one of the class's words (that program's rule). Where none does, the
    tokens of the class's phrase count, for tokenizers that split words elsewhere than CLIP's.

    Args:
        tokenizer: of the pipeline; only tokens that its text encoder reads are looked at.
        prompt: the text.

    Returns:
        class index 0 to 19 -> positions, the start token being 0; only classes that are there.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=True, max_length=length)["input_ids"]
    texts = [tokenizer.decode([token]).strip() for token in ids]
    found = {}
    for entry in Vocabulary.voc().entries:
        words = WORDS.get(entry.name, (entry.name,))
        positions = [i for i, text in enumerate(texts) if text in words]
        if not positions:
            try:
                columns = phrase_columns(tokenizer, [prompt], [[entry.phrase]], length=length)
            except PhraseNotFound:
                continue
            positions = columns[0, :, 0].nonzero().flatten().tolist()
        found[entry.id - 1] = positions
    return found


def class_levels(class_name: str, keys: Sequence[str]) -> list[str]:
    """Choose the levels that make up a class's map.

    Counted from the coarsest, so that SD 1.x at 512 pixels has that program's 64, 32 and 16 (sofa, train, tvmonitor:
    the 8 alone; diningtable: the 16 alone), and mini's 16, 8 and 4 become 16 and 8 (the 4; the 8).

    Args:
        class_name: one of VOC's.
        keys: of the levels, "0" the finest.

    Example:
        >>> class_levels("dog", ["0", "1", "2", "3"]), class_levels("sofa", ["0", "1", "2", "3"])
        (['0', '1', '2'], ['3'])
    """
    keys = sorted(keys, key=int)
    if class_name in COARSEST_ALONE:
        return keys[-1:]
    if class_name == "diningtable":
        return keys[-2:][:1]
    return keys[:-1] or keys


def fuse(levels: Sequence[Tensor]) -> Tensor:
    """Make one map [512, 512] fp32 of a class's levels, each [n, h, w] for its n tokens.

    Every map is enlarged and divided by its maximum, then all are averaged: at most 1, and slightly negative where the
    bicubic kernel overshoots.
    """
    enlarged = [F.interpolate(maps[None], (SIDE, SIDE), mode="bicubic", align_corners=False)[0] for maps in levels]
    return torch.stack([over_maximum(maps.flatten(1)) for maps in enlarged]).mean((0, 1)).view(SIDE, SIDE)


def pack_maps(maps: dict[int, np.ndarray]) -> bytes:
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


class ClassFolder:
    """That program's folder of one class; a file in it is there whole or not at all, and each .jpg has its .npy.

    Args:
        output: the folder above.
        class_name: one of VOC's.
        image_number: as asked for; part of the name.
        settings: what the images depend on beside prompt and seed; kept as a comment in each .jpg.
    """

    def __init__(self, output: Path, class_name: str, image_number: int, settings: dict[str, Any]):
        self.path = output / f"VOC_Multi_Attention_{class_name}_sub_{image_number}_NoClipRetrieval_sample"
        self.settings = settings

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, or take the one that is there, and keep other processes from writing in it.

        Raises:
            DiffuMaskError: it cannot be written, or is in use.
        """
        for name in ("train_image", "npy"):
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
            DiffuMaskError: it holds images that were drawn otherwise.
        """
        for path in self.path.glob(".*.tmp"):
            path.unlink()
        strange = {path.stem for path in self.path.glob("train_image/*.jpg")} - {drawing.stem for drawing in drawings}
        if strange:
            raise DiffuMaskError(
                f"{self.path} holds {min(strange)}.jpg, which has no place among these numbers: give the `thread_num` "
                "that it was begun with, or another `output`"
            )
        return [drawing for drawing in drawings if not self._has(drawing)]

    def write(self, drawing: Drawing, image: Image.Image, maps: dict[int, np.ndarray]) -> None:
        """Write one image and its maps; the .jpg comes last."""
        stream = io.BytesIO()
        image.save(stream, "JPEG", comment=self._provenance(drawing))
        for folder, ending, data in (("npy", "npy", pack_maps(maps)), ("train_image", "jpg", stream.getbuffer())):
            name = f"{drawing.stem}.{ending}"
            write_file(self.path / folder / name, data, temporary=self.path / f".{name}.tmp")

    def record(self, drawings: Sequence[Drawing]) -> None:
        """Write prompts.jsonl: prompt, seed and settings of every image that belongs into the folder."""
        path = self.path / "prompts.jsonl"
        data = b"".join(self._provenance(drawing) + b"\n" for drawing in drawings)
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)

    def _provenance(self, drawing: Drawing) -> bytes:
        own = {"image": drawing.stem, "class": drawing.class_name, "prompt": drawing.prompt, "seed": drawing.seed}
        return json.dumps(own | self.settings).encode()

    def _has(self, drawing: Drawing) -> bool:
        path = self.path / "train_image" / f"{drawing.stem}.jpg"
        if not path.is_file():
            return False
        data = path.read_bytes()
        if not data.endswith(b"\xff\xd9"):  # cut off, by whatever copied it
            return False
        if (comment := self._provenance(drawing)) not in data[:65536]:
            found = re.search(rb'\{"image": .*?\}', data[:65536])
            old, new = json.loads(found[0]) if found else {}, json.loads(comment)
            changes = [f"{name} {change}" for name, change in differences(old, new)]
            why = f"with other settings: {', '.join(changes)[:300]}" if old else "by another program"
            raise DiffuMaskError(f"{path} was drawn {why}; give the old settings, or another `output`")
        maps = self.path / "npy" / f"{drawing.stem}.npy"
        return maps.is_file() and maps.stat().st_size == packed_size(len(drawing.tokens))


def plan_class(pipe: DiffuMaskPipeline, entry: ClassEntry, image_number: int, thread_num: int) -> list[Drawing]:
    """Plan the images of one class; a prompt depends on class and seed alone.

    Raises:
        DiffuMaskError: the tokenizer cuts the class's word off every prompt.
    """
    tokenizer = pipe.pipe.tokenizer
    tokens = functools.cache(lambda prompt: word_tokens(tokenizer, prompt))
    seeds = image_seeds(image_number, thread_num)
    requests = plan(
        Vocabulary((entry,)), max(seeds) - FIRST_SEED + 1, scenes=pipe.info.scenes,
        fits=lambda prompt, phrases: entry.id - 1 in tokens(prompt),
    )  # fmt: skip
    prompts = [requests[seed - FIRST_SEED].prompt for seed in seeds]
    return [Drawing(entry.name, seed, prompt, tokens(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]


@torch.no_grad()
def draw(
    pipe: DiffuMaskPipeline, batch: Sequence[Drawing], steps: int, guidance_scale: float, num_columns: int
) -> Iterator[tuple[Image.Image, dict[int, np.ndarray]]]:
    """Draw one batch; give each image at 512x512 and its maps {class index: float32 [512, 512]}.

    Raises:
        DiffuMaskError: an image is not finite.
    """
    positions = [[token for tokens in drawing.tokens.values() for token in tokens] for drawing in batch]
    with (
        timed_decoding(pipe.pipe, pipe.seconds),
        collect_maps(
            pipe.pipe, [[str(token) for token in row] for row in positions], propagate="none", pad_to=num_columns,
            token_indices=[[[token] for token in row] for row in positions],
        ) as collected,
    ):  # fmt: skip
        generators = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch]
        pixels = pipe.pipe(
            [drawing.prompt for drawing in batch], num_inference_steps=steps, guidance_scale=guidance_scale,
            generator=generators, output_type="pt", return_dict=False,
        )[0].float()  # fmt: skip
    sizes = collected.store.sizes
    levels = {key: maps.unflatten(-1, sizes[key]) for key, maps in collected.levels.items()}
    names = Vocabulary.voc().names
    for row, drawing in enumerate(batch):
        if not pixels[row].isfinite().all():
            raise DiffuMaskError(f"{drawing.stem} is not finite, so it was not written: use `dtype=fp32`")
        # truncated, as that program does
        array = (pixels[row].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        maps, first = {}, 0
        for index, tokens in drawing.tokens.items():
            columns = slice(first, first := first + len(tokens))
            chosen = class_levels(names[index], list(levels))
            maps[index] = fuse([levels[key][row, columns] for key in chosen]).cpu().numpy()
        yield image, maps


def run(options: argparse.Namespace) -> None:
    """Draw the images of all classes that are not there yet.

    Raises:
        DiffuMaskError: anything that keeps the run from starting or from going on, in one sentence.
    """
    for name in ("thread_num", "image_number", "steps"):
        if (value := getattr(options, name)) is not None:
            checked(name, value, whole(1))
    if options.guidance_scale is not None:
        checked("guidance_scale", options.guidance_scale, number())
    voc, console = Vocabulary.voc(), Console(stderr=True)
    vocabulary = Vocabulary.named(Vocabulary.parse(options.classes, voc, "the layout of 20 classes").names)
    pipe = DiffuMaskPipeline.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    info = pipe.info
    pipe.pipe.set_progress_bar_config(disable=True)
    unknown = [name for name in vocabulary.names if info.classes and name not in info.classes]
    if unknown:
        print(f"{options.model} never learnt {', '.join(unknown)}: its images will show little.", file=sys.stderr)
    best = (info.num_inference_steps, info.guidance_scale) if info.scenes is not None else (STEPS, GUIDANCE)
    steps = options.steps or best[0]
    guidance = best[1] if options.guidance_scale is None else options.guidance_scale
    model = {"model": info.identity, "weights": pipe.weights, "scheduler": type(pipe.pipe.scheduler).__name__}
    settings = model | {"steps": steps, "guidance_scale": guidance}
    size = pipe.batch_size(options.batch_size)
    for entry in vocabulary.entries:
        folder = ClassFolder(options.output, entry.name, options.image_number, settings)
        drawings = plan_class(pipe, entry, options.image_number, options.thread_num)
        columns = max(sum(map(len, drawing.tokens.values())) for drawing in drawings)
        with folder.locked():
            missing = folder.missing(drawings)
            if options.record:
                folder.record(drawings)
            batches = [missing[i : i + size] for i in range(0, len(missing), size)]
            for batch in track(batches, entry.name, console=console, disable=not console.is_terminal, transient=True):
                for drawing, (image, maps) in zip(batch, draw(pipe, batch, steps, guidance, columns), strict=True):
                    folder.write(drawing, image, maps)
        print(f"{folder.path}: {len(drawings)} images, {len(missing)} of them drawn now")


def parser() -> argparse.ArgumentParser:
    """Return the parser: that program's flags first, then ours."""
    flags = argparse.ArgumentParser(
        "python -m diffumask_fast.dropin", allow_abbrev=False,
        description="Draw images and attention maps in the layout of the DiffuMask paper's program; run again to "
        "finish. docs/from-diffumask.md tells what is the same and what is not.",
    )  # fmt: skip
    add = flags.add_argument
    add("--classes", required=True, help="One VOC class; also several joined by commas, or voc for all 20.")
    add("--thread_num", type=int, default=1, help="Workers of the original: decides seeds and numbers, no more.")
    add("--output", type=Path, required=True, help="Folder of the class folders.")
    add("--image_number", type=int, required=True, help="Images of each class.")
    add("--MY_TOKEN", help="Taken and not used: log in to the hub with `hf auth login`.")
    add("--model", default="mini", help="mini, a diffusers folder, or a hub id.")
    add("--record", action="store_true", help="Also write prompts.jsonl: prompt and seed of each image.")
    add("--batch_size", default="auto", help="Images per batch, or auto.")
    add("--steps", type=int, help="The model's best when left out, 50 where it names none.")
    add("--guidance_scale", type=float, help="The model's best when left out, 7 where it names none.")
    add("--dtype", default="auto", help="auto, fp32, fp16 or bf16.")
    add("--device", default="auto", help="auto, cpu or cuda.")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0 done, 1 failed with one sentence, 130 stopped."""
    options = parser().parse_args(arguments)
    logger.addHandler(logging.NullHandler())
    try:
        run(options)
    except KeyboardInterrupt:
        print("Stopped; run the same command again to finish.", file=sys.stderr)
        return 130
    except DiffuMaskError as error:
        print(error.as_flags("_"), file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user; the log has it
        logger.exception("unexpected")
        print(f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
