"""What `diffumask-fast convert` does: a dataset's rows, shard by shard and in several processes, as other files."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffumask_fast.convert.formats import WITH_MAPS, Format, Job, format_named
from diffumask_fast.convert.item import Item, make_item
from diffumask_fast.convert.options import ConvertOptions
from diffumask_fast.convert.plan import SPLITS, Plan, Shard, Split, make_plan, number_classes, palette_for, picked
from diffumask_fast.convert.public import numbers_like, public_names
from diffumask_fast.convert.target import Target, digest, join, write_part
from diffumask_fast.dataset.derive import check_apart
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.vocabulary import voc_palette

logger = logging.getLogger(__name__)

COLUMNS = ("key", "image", "mask", "classes", "class_ids", "prompt", "negative_prompt", "seed", "quality")
MAPS = ("maps", "map_sizes")


def convert(
    options: ConvertOptions, *, progress: Callable[[int], Progress] = lambda total: Progress(disable=True)
) -> dict[str, Any]:
    """Write a dataset in another program's format; run again, it is finished.

    A few rows are in memory at a time. Every file is there whole or not at all, and which process wrote it makes no
    difference to it. A script that calls this with several workers needs `if __name__ == "__main__":`, as any that
    starts processes.

    Args:
        options: what, how and where to.
        progress: makes a progress bar of the number of shards.

    Returns:
        folder, format, images, train, val, and images_per_s of what was written now, 0 where nothing was.

    Raises:
        DiffuMaskError: the dataset is not finished or holds something that the format cannot; the folder cannot be
            written, is in use, or holds something else.

    Example:
        convert(ConvertOptions(Path("demo"), Path("demo-voc"), "voc", val=0.1))
    """
    source, out, start, written = options.source, options.out, time.perf_counter(), 0
    check_apart(source, out)
    manifest = read_manifest(source)
    record = {name: getattr(options, name) for name in ("to", "val", "seed", "image_format", "all")}
    record |= {"like": options.like} if options.like else {}
    with Target(out, record | {"source": digest(manifest)}) as target:
        if (counts := target.finished) is None:
            plan = make_plan(manifest, options)
            numbers = _numbers(plan, manifest, options)
            target.begin()
            counts = dict(plan.counts)
            written = _fill(target, plan, numbers, options, progress)
            target.finish(counts)
    rate = round(written / (time.perf_counter() - start), 2)
    return {"folder": str(out), "format": options.to, "images": sum(counts.values()), **counts, "images_per_s": rate}


def _numbers(plan: Plan, manifest: Mapping[str, Any], options: ConvertOptions) -> dict[int, int]:
    how = format_named(options.to).NUMBERING
    if options.like:
        return numbers_like(options.like, how, plan.classes, manifest["classes"])
    numbers = number_classes(plan.classes, how)
    theirs = public_names("coco", how).items() if how == "own" else ()
    if theirs and set(plan.classes.values()) <= {name for _, name in theirs} and not plan.classes.items() <= theirs:
        logger.warning(
            "category ids are this dataset's and not COCO's, though all names are COCO's: to mix the files with COCO's "
            "own, convert with --like coco"
        )
    return numbers


def _fill(
    target: Target,
    plan: Plan,
    numbers: Mapping[int, int],
    options: ConvertOptions,
    progress: Callable[[int], Progress],
) -> int:
    """Write what is missing; return the number of images in it."""
    job = Job(
        out=options.out,
        classes=_names(plan, numbers, options),
        splits=tuple(split for split in SPLITS if plan.counts[split]),
        image_format=options.image_format,
        images=sum(plan.counts.values()),
        palette=voc_palette() if options.like else palette_for(plan, numbers),
        like=options.like,
    )
    tasks = [_Task(job, options, plan.split, shard, numbers) for shard in plan.shards if not target.done(shard.index)]
    with progress(len(plan.shards)) as bar:
        bar_task = bar.add_task("shards", total=len(plan.shards), completed=len(plan.shards) - len(tasks))
        for _ in _run(tasks, target, options.workers or len(os.sched_getaffinity(0))):
            bar.advance(bar_task)
    format_named(options.to).write_lists(job, lambda split: target.records(len(plan.shards), split))
    return sum(task.shard.count for task in tasks)


def _names(plan: Plan, numbers: Mapping[int, int], options: ConvertOptions) -> dict[int, str]:
    """Return number in the files -> name."""
    if options.like:
        return public_names(options.like, format_named(options.to).NUMBERING)
    return {number: plan.classes[class_id] for class_id, number in numbers.items()}


@dataclass(frozen=True)
class _Task:
    """A shard to convert, with all that a process needs to know for it."""

    job: Job
    options: ConvertOptions
    split: Split
    shard: Shard
    numbers: Mapping[int, int]

    def run(self) -> None:
        """Write the files of the shard."""
        kind: Format = format_named(self.options.to)
        write_part(self.job.out, self.shard.index, kind.write_items(self.job, self.shard, self._items()))

    def _items(self) -> Iterator[Item]:
        path, columns = self.shard.path, COLUMNS + (MAPS if self.options.to in WITH_MAPS else ())
        for number, row in enumerate(picked(path, self.options, columns), self.shard.first):
            try:
                item = make_item(
                    row, self.split.of(row), number, self.options.image_format, self.numbers, self.job.classes
                )
            except DiffuMaskError as error:
                raise error if str(path) in str(error) else DiffuMaskError(f"{path}: {error}") from error
            yield item


def _run(tasks: list[_Task], target: Target, workers: int) -> Iterator[None]:
    """Run the tasks, and yield after each."""
    workers = min(workers, len(tasks))
    if workers < 2:
        for task in tasks:
            task.run()
            yield
        return
    # forked processes would inherit threads' locks in whatever state they are
    context = multiprocessing.get_context("spawn")
    target.share()
    with ProcessPoolExecutor(workers, context, _begin_process, (target.path,)) as pool:
        try:
            for done in as_completed([pool.submit(task.run) for task in tasks]):
                yield done.result()
        except BrokenProcessPool as error:
            raise DiffuMaskError(
                "a process of the conversion died, perhaps for want of memory: run the same again with fewer `workers` "
                '(a script needs `if __name__ == "__main__":` to start any)'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process(out: Path) -> None:
    """Lock the folder, and end as soon as the process that started this one has ended, however.

    The pool's own pipes do not tell: each of its processes holds both ends, and waits at them for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    join(out)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=([parent.sentinel],), daemon=True).start()


def _exit_after(sentinels: Iterable[int]) -> None:
    wait(list(sentinels))
    os._exit(1)
