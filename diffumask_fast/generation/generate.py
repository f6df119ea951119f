"""What `diffumask-fast generate` does: read options, make the job, draw what is missing, write, show."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from diffumask_fast import __version__
from diffumask_fast.attention.choice import attention_of
from diffumask_fast.attention.families import denoising_model
from diffumask_fast.dataset.reader import read_manifest, shard_paths
from diffumask_fast.dataset.run import Run, open_run
from diffumask_fast.dataset.schema import MANIFEST
from diffumask_fast.dataset.shard_writer import ShardWriter
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError, is_out_of_memory
from diffumask_fast.generation.captions import with_captions
from diffumask_fast.generation.draw import Row, draw_shards
from diffumask_fast.generation.job import Job, make_job, open_pipe, taken_for
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.generation.quota import Tally, below, explain_below, next_round, tally
from diffumask_fast.generation.shard_log import ShardLog
from diffumask_fast.generation.stopping import Stop, stop_on_sigterm
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import BROKEN, advice
from diffumask_fast.models.loading import quietly
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.vocabulary import SHIPPED, Vocabulary, is_file
from diffumask_fast.results import Result

if TYPE_CHECKING:
    from diffumask_fast.generation.cluster import Cluster

logger = logging.getLogger("diffumask_fast")
MAX_TOLD = 5  # names in one line
FEWEST = 8  # images by which a run is judged


def run_generate(options: GenerateOptions, progress: Callable[[int | None], Progress]) -> dict[str, Any]:
    """Draw a dataset, or finish one that was begun with the same options.

    Args:
        options: the flags.
        progress: gets the number of images, None where that is unknown, and gives a rich Progress.

    Returns:
        images and accepted (of the run, or of its part), drawn (in this call), part, missing_shards (of the whole
        run), images_per_s, seconds by stage ("encode" and "write": for how long they held up the drawing), captions
        (how many were found in the file, of classes or of combinations of them), dropped_captions, folder, advice (what
        to change when no image is accepted), below_quota (the classes that lack accepted images), why_below_quota (a
        sentence).

    Raises:
        DiffuMaskError: anything that keeps the run from starting or from going on, in one sentence.
    """
    with quietly(), _opened(options) as (pipe, job, surroundings):
        if taken := taken_for(options, job, pipe.info):
            logger.log(logging.WARNING if pipe.info.doubt else logging.INFO, "%s", taken)
        job = with_captions(_resumed(job, options.out), options.prompts, pipe, options.out, progress)
        plan = job.plan(pipe)
        with stop_on_sigterm() as stop, open_run(
            options.out, plan, job.options, surroundings, job.shard_size, options.allow_drift,
            model={"id": job.identity, "weights": job.weights}, vocabulary=job.recipe.vocabulary, rounds=job.rounds,
            part=options.part, captions=_captions(job),
        ) as run:  # fmt: skip
            if not pipe.info.classes and options.classes not in (None, *SHIPPED) and not is_file(options.classes):
                tell_new_names(job.recipe.vocabulary)
            start = time.perf_counter()
            with _enough_memory(job):
                job, drawn, writing, lacking = _draw_all(pipe, job, run, progress, stop)
            seconds = time.perf_counter() - start
            accepted = sum(run.accepted_flags())
            reasons = [] if accepted else [row.reason for row in run.rows(accepted_only=False, columns=["reason"])]
            missing = run.show(pipe.info.folder, max(MAX_PIXELS, job.height * job.width))
    return {
        "folder": str(options.out), "images": sum(map(job.num_rows, run.shards)), "accepted": accepted, "drawn": drawn,
        "part": str(run.part) if run.part else None, "missing_shards": missing,
        "captions": {"+".join(names): len(found) for names, found in _retrieved(job)},
        "dropped_captions": plan.dropped, "images_per_s": drawn / seconds if drawn else 0.0,
        "seconds": {**pipe.seconds.as_dict(), "write": writing, "all": seconds},
        "advice": advice(reasons, job.mask), "below_quota": [one.name for one in lacking],
        "why_below_quota": explain_below(lacking, job.accept_per_class or 0, job.mask) if lacking else "",
    }  # fmt: skip


@contextmanager
def _opened(options: GenerateOptions) -> Iterator[tuple[DiffuMaskPipeline | Cluster, Job, dict[str, Any]]]:
    """Give what draws, the job, and the environment in which it is drawn."""
    if options.ray is not None:
        from diffumask_fast.generation.cluster import Cluster

        with Cluster(options) as cluster:
            yield cluster, cluster.job, cluster.environment
        return
    if options.workers is not None:
        raise DiffuMaskError("`workers` are Ray's: say `ray=local` too, or leave them out")
    pipe = open_pipe(options, options.device)
    yield pipe, make_job(options, pipe), environment(pipe)


def _resumed(job: Job, folder: Place) -> Job:
    """Return the job with the rounds that were begun in a folder; what else differs there, `open_run` says."""
    if not job.accept_per_class or not shard_paths(folder) or not (folder / MANIFEST).exists():
        return job
    there = read_manifest(folder)
    return job.resumed(there["plan"]) if there["options"].get("classes") == job.options["classes"] else job


def tell_new_names(vocabulary: Vocabulary) -> None:
    """Name the classes that VOC does not have, which may be slips of the pen."""
    voc = Vocabulary.voc().names
    new = [entry for entry in vocabulary.entries if entry.name not in voc]
    if new:
        told = ", ".join(f"{entry.phrase!r} (id {entry.id})" for entry in new[:MAX_TOLD])
        more = f" and {len(new) - MAX_TOLD} more" if len(new) > MAX_TOLD else ""
        logger.warning("not among VOC's classes, drawn as these words: %s%s", told, more)


def _draw_all(
    pipe: DiffuMaskPipeline | Cluster, job: Job, run: Run, progress: Callable[[int], Progress], stop: Stop
) -> tuple[Job, int, float, list[Tally]]:
    """Draw what is missing, and round after round where a number of accepted images is asked for.

    Returns:
        The job with all its rounds, the number of images, for how long writing held up the drawing, and the classes
        that lack accepted images.
    """
    drawn, waited, quota = 0, 0.0, job.accept_per_class
    while True:
        num, seconds = _draw_missing(pipe, job, run, progress, stop)
        drawn, waited = drawn + num, waited + seconds
        if quota is None:
            return job, drawn, waited, []
        rows = run.rows(accepted_only=False, columns=["classes", "reason"])
        tallies = tally(rows, job.recipe.vocabulary.names)
        counts = next_round(tallies, quota, job.shard_size)
        if not counts:
            return job, drawn, waited, below(tallies, quota)
        job = job.with_rounds([*job.recipe.rounds, counts])
        run.extend(job.plan(pipe), job.rounds)


def _draw_missing(
    pipe: DiffuMaskPipeline | Cluster, job: Job, run: Run, progress: Callable[[int], Progress], stop: Stop
) -> tuple[int, float]:
    """Draw and write the missing shards; return the number of images, and for how long writing held up the drawing.

    Raises:
        DiffuMaskError: it was to stop, and shards are still missing.
    """
    missing, total = run.missing_shards(), sum(map(job.num_rows, run.shards))
    num = sum(map(job.num_rows, missing))
    first = FirstImages(min(max(job.batch_size, FEWEST), num) if len(missing) == len(run.shards) else 0, job.mask)
    _check_stop(stop, run)
    log = ShardLog(pipe)
    with progress(total) as bar, ShardWriter(run, log.written) as writer:
        task = bar.add_task("drawing", total=total, completed=total - num)

        def on_result(result: Result) -> None:
            bar.advance(task)
            writer.check()
            first.judge(result)

        smallest = job.batch_size

        def on_smaller(batch_size: int, indices: list[int]) -> None:
            nonlocal smallest
            log.retried()
            run.reduce_batch_size(batch_size, indices)
            if batch_size < smallest:
                smallest = batch_size
                logger.warning(
                    "memory is short: from shard %d on a batch has %d images, whose bytes may differ from those of "
                    "larger batches; dataset.json records it", indices[0], batch_size,
                )  # fmt: skip

        def drawn() -> Generator[tuple[int, list[Row]]]:
            for size, indices in groupby(missing, run.batch_sizes().get):
                smaller = replace(job, batch_size=size or job.batch_size)
                yield from _draw(pipe, smaller, indices, on_result, on_smaller)

        waiting = []
        with closing(drawn()) as shards:
            for index, rows in shards:
                log.drawn(index, rows)
                waiting.append((index, rows))
                while first.judged and waiting:
                    writer.add(*waiting.pop(0))
                if stop.asked and not waiting:
                    break
    _check_stop(stop, run)
    return num, writer.waited


def _draw(
    pipe: DiffuMaskPipeline | Cluster,
    job: Job,
    indices: Iterable[int],
    on_result: Callable[[Result], Any],
    on_smaller: Callable[[int, list[int]], Any],
) -> Generator[tuple[int, list[Row]]]:
    """Draw shards here, or on a cluster."""
    if isinstance(pipe, DiffuMaskPipeline):
        return draw_shards(pipe, job, indices, on_result, on_smaller)
    return pipe.draw_shards(job, indices, on_result, on_smaller)


def _check_stop(stop: Stop, run: Run) -> None:
    """Raise where the run is to end before it is finished."""
    missing = len(run.missing_shards())
    if stop.asked and missing:
        raise DiffuMaskError(
            f"stopped by SIGTERM after a whole shard, with {missing} of {len(run.shards)} shards missing: run the same "
            "command again to finish it"
        )


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
    elif attention_of(denoising_model(pipe.pipe)) == "xformers":
        versions["xformers"] = metadata.version("xformers")
    if pipe.info.loras:
        versions["peft"] = metadata.version("peft")
    return {
        "device": name, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "diffumask_fast": __version__, **versions,
    }  # fmt: skip


def _retrieved(job: Job) -> Sequence[tuple[tuple[str, ...], tuple[str, ...]]]:
    return job.recipe.retrieved.captions if job.recipe.retrieved else ()


def _captions(job: Job) -> bytes | None:
    return job.recipe.retrieved.as_bytes() if job.recipe.retrieved else None
