"""Plan the images of a class as the paper's program numbers them, and draw them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.dropin.class_maps import SIDE, class_levels, fuse, word_tokens
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.decoding import timed_decoding
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary

FIRST_SEED = 200_000


@dataclass(frozen=True)
class Drawing:
    """One image to draw: its seed names it, its prompt's tokens of each class (index 0 to 19) give its maps."""

    class_name: str
    seed: int
    prompt: str
    tokens: dict[int, list[int]]

    @property
    def stem(self) -> str:
        """The file name without its ending; that program adds one to the seed before it saves."""
        return f"image_{self.class_name}_{self.seed + 1}"


def image_seeds(image_number: int, thread_num: int) -> list[int]:
    """Return the seeds of N images (at least 1), as that program's w workers (at least 1) share them.

    Worker i of w begins at 200000 + 2i(N // w) and draws N // w images. That program never draws the remaining N % w;
    here each of the first workers draws one of them more, with a number that it leaves free. Workers beyond the number
    of images draw nothing.

    Example:
        >>> image_seeds(5, 2)
        [200000, 200001, 200002, 200004, 200005]
    """
    workers = min(thread_num, image_number)
    share, rest = divmod(image_number, workers)
    firsts = [FIRST_SEED + 2 * worker * share for worker in range(workers)]
    return [first + i for worker, first in enumerate(firsts) for i in range(share + (worker < rest))]


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
    pipe: DiffuMaskPipeline, batch: Sequence[Drawing], steps: int, guidance_scale: float, num_tokens: int
) -> Iterator[tuple[Image.Image, dict[int, np.ndarray]]]:
    """Draw one batch; yield each image at 512x512 and its maps {class index: float32 [512, 512]}.

    Args:
        pipe: what draws.
        batch: the images.
        steps: of denoising.
        guidance_scale: of the drawing.
        num_tokens: the most tokens of a drawing; all batches are padded to it, so that shapes do not change.

    Raises:
        DiffuMaskError: an image is not finite.
    """
    positions = [[token for tokens in drawing.tokens.values() for token in tokens] for drawing in batch]
    with (
        timed_decoding(pipe.pipe, pipe.seconds),
        collect_maps(
            pipe.pipe, [[str(token) for token in row] for row in positions], propagate="none", pad_to=num_tokens,
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
        # Truncated, not rounded as in pipeline.py: the paper's program does so, and its images are compared with these.
        array = (pixels[row].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        maps, first = {}, 0
        for index, tokens in drawing.tokens.items():
            columns = slice(first, first := first + len(tokens))
            chosen = class_levels(names[index], list(levels))
            maps[index] = fuse([levels[key][row, columns] for key in chosen]).cpu().numpy()
        yield image, maps
