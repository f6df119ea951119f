"""What `diffumask-fast generate` does: read options, make the job, draw what is missing, write, show."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from typing import Any

import torch
from rich.progress import Progress

from diffumask_fast import __version__
from diffumask_fast.attention.choice import attention_of
from diffumask_fast.dataset.finish import finish
from diffumask_fast.dataset.run import Run, open_run
from diffumask_fast.dataset.shard_writer import ShardWriter
from diffumask_fast.errors import DiffuMaskError, is_out_of_memory
from diffumask_fast.generation.draw import draw_shards
from diffumask_fast.generation.job import Job, make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import BROKEN, advice
from diffumask_fast.models.loading import quietly
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.vocabulary import Vocabulary
from diffumask_fast.results import Result

logger = logging.getLogger("diffumask_fast")
MAX_TOLD = 5  # names in one line
FEWEST = 8  # images by which a run is judged


def run_generate(options: GenerateOptions, progress: Callable[[int], Progress]) -> dict[str, Any]:
    """Draw a dataset, or finish one that was begun with the same options.

    Args:
        options: the flags.
        progress: gets the number of images and gives a rich Progress.

    Returns:
        images, accepted, drawn (in this call), images_per_s, seconds by stage ("encode" and "write": for how long they
        held up the drawing), dropped_captions, folder, advice (what to change when no image is accepted).

    Raises:
        DiffuMaskError: anything that keeps the run from starting or from going on, in one sentence.
    """
    with quietly():
        pipe = open_pipe(options, options.device)
        job = make_job(options, pipe)
        plan = job.plan(pipe)
        with open_run(
            options.out, plan, job.options, environment(pipe), job.shard_size, options.allow_drift,
            model={"id": job.identity, "weights": job.weights}, vocabulary=job.recipe.vocabulary,
        ) as run:  # fmt: skip
            if not pipe.info.classes:
                tell_new_names(job.recipe.vocabulary)
            start = time.perf_counter()
            with _enough_memory(job):
                drawn, writing = _draw_missing(pipe, job, run, progress)
            seconds = time.perf_counter() - start
            accepted = sum(run.accepted_flags())
            reasons = [] if accepted else [row.reason for row in run.rows(accepted_only=False, columns=["reason"])]
            finish(options.out, pipe.info.folder, max_pixels=max(MAX_PIXELS, job.height * job.width))
    return {
        "folder": str(options.out), "images": len(plan), "accepted": accepted, "drawn": drawn,
        "dropped_captions": plan.dropped, "images_per_s": drawn / seconds if drawn else 0.0,
        "seconds": {**pipe.seconds.as_dict(), "write": writing, "all": seconds},
        "advice": advice(reasons, job.mask),
    }  # fmt: skip


def tell_new_names(vocabulary: Vocabulary) -> None:
    """Name the classes that VOC does not have, which may be slips of the pen."""
    voc = Vocabulary.voc().names
    new = [entry for entry in vocabulary.entries if entry.name not in voc]
    if new:
        told = ", ".join(f"{entry.phrase!r} (id {entry.id})" for entry in new[:MAX_TOLD])
        more = f" and {len(new) - MAX_TOLD} more" if len(new) > MAX_TOLD else ""
        logger.warning("not among VOC's classes, drawn as these words: %s%s", told, more)


def _draw_missing(
    pipe: DiffuMaskPipeline, job: Job, run: Run, progress: Callable[[int], Progress]
) -> tuple[int, float]:
    """Draw and write the missing shards; return the number of images, and for how long writing held up the drawing."""
    missing, total = run.missing_shards(), job.recipe.num
    num = sum(map(job.num_rows, missing))
    first = FirstImages(min(max(job.batch_size, FEWEST), num) if len(missing) == job.num_shards else 0, job.mask)
    with progress(total) as bar, ShardWriter(run) as writer:
        task = bar.add_task("drawing", total=total, completed=total - num)

        def on_result(result: Result) -> None:
            bar.advance(task)
            writer.check()
            first.judge(result)

        waiting = []
        with closing(draw_shards(pipe, job, missing, on_result)) as shards:
            for shard in shards:
                waiting.append(shard)
                while first.judged and waiting:
                    writer.add(*waiting.pop(0))
    return num, writer.waited


@contextmanager
def _enough_memory(job: Job) -> Iterator[None]:
    """Say what to do when memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DiffuMaskError(
            f"there is not enough memory for batches of {job.batch_size} images of {job.height}x{job.width}: give a "
            "smaller `batch_size` or `size`"
        ) from error


class FirstImages:
    """Stop a run when over 90 % of its first images are rejected: then its settings are wrong.

    Args:
        num: images to judge; of fewer than four, only whether all of them are broken, for a mask may fail by chance.
        options: by which they are rejected.
    """

    def __init__(self, num: int, options: MaskOptions) -> None:
        self._num, self._options = num, options
        self._reasons: list[str] = []

    @property
    def judged(self) -> bool:
        """Whether all of them were seen."""
        return len(self._reasons) == self._num

    def judge(self, result: Result) -> None:
        """Count the next image.

        Raises:
            DiffuMaskError: it is the last of them, and nearly all were rejected.
        """
        if self.judged:
            return
        self._reasons.append(result.reason)
        rejected = list(filter(None, self._reasons))
        if self._num < 4:
            rejected = [reason for reason in rejected if reason in BROKEN]
        if self.judged and len(rejected) > 0.9 * self._num:
            common, _ = Counter(rejected).most_common(1)[0]
            own = advice(rejected, self._options)
            raise DiffuMaskError(
                f"{len(rejected)} of the first {self._num} images were rejected ({common}), so nothing was written; "
                f"{own and f'{own}, or '}check `model`, `dtype`, `steps` and `guidance_scale`."
            )


def environment(pipe: DiffuMaskPipeline) -> dict[str, Any]:
    """Return what the bytes of a run depend on besides its options: device, threads, versions."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    libraries = ["torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow"]
    versions = {library: metadata.version(library) for library in libraries}
    if pipe.engine is not None:
        versions |= pipe.engine.libraries
    elif attention_of(pipe.pipe.unet) == "xformers":
        versions["xformers"] = metadata.version("xformers")
    return {
        "device": name, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "diffumask_fast": __version__, **versions,
    }  # fmt: skip
