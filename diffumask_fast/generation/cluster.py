"""`generate --ray`: the shards of a job are drawn by workers that Ray places, and written here."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.borrow import patched, patched_environment
from diffumask_fast.dataset.folder import differences
from diffumask_fast.errors import DiffuMaskError, first_line, in_one_line
from diffumask_fast.generation.draw import Row, draw_shards
from diffumask_fast.generation.embedding import compares_texts, embed
from diffumask_fast.generation.generate import environment
from diffumask_fast.generation.job import Job, make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions, PromptOptions
from diffumask_fast.models.loading import quietly
from diffumask_fast.models.lora import absolute_text
from diffumask_fast.prompts.vocabulary import is_file
from diffumask_fast.results import Seconds

logger = logging.getLogger("diffumask_fast")

AHEAD = 2  # shards that a worker has been handed: the one at hand and the next
DRIVERS = ("out", "ray", "workers", "allow_drift")  # options that make no difference to a worker
MOST_LOSSES = 3  # of workers with the same shard
PATIENCE = 60.0  # seconds after which somebody should know that no worker has begun
STATISTICS = "RAY_USAGE_STATS_ENABLED"


class Worker:
    """What Ray runs in a process of its own: it holds a pipeline, and draws the shards that it is handed."""

    def begin(self, options: str, device: str, threads: int) -> dict[str, Any]:
        """Load the pipeline.

        Args:
            options: `GenerateOptions` as JSON.
            device: "cpu" or "cuda", which is the GPU that Ray has given the process.
            threads: of torch.

        Returns:
            What the driver plans and records: job (JSON types), environment, classes and folder of the model, what
            tells its steps and guidance, its tokenizer, and whether its encoder's vectors of texts can be compared.

        Raises:
            DiffuMaskError: it cannot be loaded, or cannot draw what is asked for.
        """
        torch.set_num_threads(threads)
        with quietly():
            asked = _options_of(options)
            self._pipe = open_pipe(asked, device)
            job = make_job(asked, self._pipe)
        info = self._pipe.info
        return {
            "job": job.as_json(), "environment": environment(self._pipe), "classes": info.classes,
            "folder": info.folder and str(info.folder), "origin": info.origin, "doubt": info.doubt,
            "tokenizer": self._pipe.tokenizer, "compares_texts": compares_texts(self._pipe),
        }  # fmt: skip

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, as `embedding.embed`."""
        return embed(self._pipe, texts)

    _batch_size: int | None = None  # that fits the memory, once it was short

    def draw(self, job: str, index: int) -> tuple[list[Row], dict[str, float], int]:
        """Return the rows of a shard, the seconds that they took by stage, and the size of their batches.

        Args:
            job: as JSON.
            index: of the shard.

        Raises:
            DiffuMaskError: as `draw_shards`.
        """
        self._pipe.seconds = Seconds()
        asked = Job.from_json(json.loads(job))
        sizes = [min(asked.batch_size, self._batch_size or asked.batch_size)]
        with quietly():
            smaller = replace(asked, batch_size=sizes[0])
            [(_, rows)] = draw_shards(self._pipe, smaller, [index], on_smaller=lambda size, _: sizes.append(size))
        if sizes[-1] < asked.batch_size:
            self._batch_size = sizes[-1]
        return rows, self._pipe.seconds.as_dict(), sizes[-1]


class Cluster:
    """Workers in the place of a pipeline; to be used in a `with` statement, at whose end they are gone.

    Each has a GPU, or on CPUs one thread. All have one environment, so the bytes are those of one process with as many
    threads. A worker that is lost costs the shard that it was drawing, which another one draws anew.

    Args:
        options: the flags.

    Raises:
        DiffuMaskError: Ray is not installed or cannot be reached, the workers differ, or as `open_pipe` and `make_job`.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._ray = _import_ray()
        self._options = _for_workers(options)
        self.seconds = Seconds()  # of all workers together
        self.device = torch.device("cpu")  # of this process, which draws nothing
        self._ready: list[Any] = []
        self._beginning: dict[Any, Any] = {}  # what `begin` will have returned -> worker
        self._losses: Counter[int | None] = Counter()  # by shard; None is of workers that had not begun
        self._first: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        with ExitStack() as held:
            held.enter_context(_connected(self._ray, self._options))
            held.callback(self._stop)
            self._device, number = _place(self._ray.cluster_resources(), self._options)
            for _ in range(number):
                self._start()
            while not self._ready:
                self._wait_for_worker()
            self._held = held.pop_all()
        self.job = Job.from_json(self._first["job"])
        self.environment: dict[str, Any] = self._first["environment"]
        folder = self._first["folder"]  # read for its licence, where it is on this machine too
        told = {name: self._first[name] for name in ("classes", "origin", "doubt")}
        self.info = SimpleNamespace(**told, folder=folder and Path(folder))
        self.tokenizer = self._first["tokenizer"]
        self.compares_texts: bool = self._first["compares_texts"]
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, as `embedding.embed`, made by a worker.

        Raises:
            DiffuMaskError: it was lost.
        """
        try:
            return self._get(self._ready[0].embed.remote(list(texts)))
        except self._ray.exceptions.RayError as error:
            raise DiffuMaskError("a worker of Ray was lost with captions: run the same command again") from error

    def wait_for_all(self) -> None:
        """Wait until every worker has begun; drawing itself begins with the first."""
        while self._beginning:
            self._wait_for_worker()

    def draw_shards(
        self,
        job: Job,
        indices: Iterable[int],
        on_result: Callable[[Any], Any] = lambda result: None,
        on_smaller: Callable[[int, list[int]], Any] = lambda batch_size, indices: None,
    ) -> Generator[tuple[int, list[Row]]]:
        """Draw shards of a job, as `draw.draw_shards`, in the order in which they are finished.

        Args:
            job: the run.
            indices: of the shards.
            on_result: gets the `reason` of each image once its shard is drawn.
            on_smaller: gets the batch size of a shard that was drawn in smaller batches for want of memory.

        Raises:
            DiffuMaskError: as there; or workers were lost time and again.
        """
        waiting, calls, text = deque(indices), dict[Any, tuple[Any, int]](), self._ray.put(json.dumps(job.as_json()))
        while waiting or calls:
            self._hand_out(waiting, calls, text)
            [done], _ = self._ray.wait([*calls, *self._beginning])
            if done in self._beginning:
                self._welcome(done)
                continue
            worker, index = calls[done]
            try:
                rows, seconds, batch_size = self._get(done)
            except self._ray.exceptions.RayError as error:
                open_ = [(call, one) for call, (by, one) in calls.items() if by == worker]
                for call, one in reversed(open_):
                    del calls[call]
                    waiting.appendleft(one)
                self._replace(worker, open_[0][1], error)
                continue
            del calls[done], done  # frees the memory of Ray
            for stage, value in seconds.items():
                setattr(self.seconds, stage, getattr(self.seconds, stage) + value)
            if batch_size < job.batch_size:
                on_smaller(batch_size, [index])
            for row in rows:
                on_result(SimpleNamespace(reason=row["reason"]))
            yield index, rows

    def _hand_out(self, waiting: deque[int], calls: dict[Any, tuple[Any, int]], job: Any) -> None:
        """Give each worker its shard and the next one; the last shards go to whoever has none."""
        busy = Counter(worker for worker, _ in calls.values())
        for ahead in range(1, AHEAD + 1):
            for worker in self._ready:
                if busy[worker] < ahead and waiting and (ahead == 1 or len(waiting) > len(self._ready)):
                    index = waiting.popleft()
                    calls[worker.draw.remote(job, index)] = worker, index
                    busy[worker] += 1

    def _start(self) -> None:
        kind = self._ray.remote(num_cpus=1, num_gpus=int(self._device == "cuda"), max_restarts=0)(Worker)
        worker, threads = kind.remote(), 1 if self._device == "cpu" else torch.get_num_threads()
        options = json.dumps({name: value for name, value in asdict(self._options).items() if name not in DRIVERS})
        self._beginning[worker.begin.remote(options, self._device, threads)] = worker

    def _wait_for_worker(self) -> None:
        """Wait until a worker has begun, and say so when that takes long."""
        done, _ = self._ray.wait([*self._beginning], timeout=PATIENCE)
        if not done:
            free = self._ray.available_resources()
            logger.warning(
                "no worker of Ray has begun after %.0f s: it still loads the model, or the cluster has no room (%g "
                "CPUs and %g GPUs are free; a worker takes one)", PATIENCE, free.get("CPU", 0), free.get("GPU", 0),
            )  # fmt: skip
            done, _ = self._ray.wait([*self._beginning])
        self._welcome(done[0])

    def _welcome(self, begun: Any) -> None:
        """Take a worker that has begun, or start another one in its place."""
        worker = self._beginning.pop(begun)
        try:
            found = self._get(begun)
        except self._ray.exceptions.RayError as error:
            self._replace(worker, None, error)
            return
        self._first = self._first or found
        for part in ("environment", "job"):
            if changes := list(differences(self._first[part], found[part])):
                name, change = changes[0]
                raise DiffuMaskError(
                    f"Ray's workers differ ({name} {change}), and so would what they draw: name nodes of one kind"
                )
        self._ready.append(worker)

    def _replace(self, worker: Any, index: int | None, error: Exception) -> None:
        """Start a worker in the place of one that was lost, with a shard or before it had begun."""
        self._losses[index] += 1
        what = "before it had begun" if index is None else f"with shard {index}"
        cause = first_line(error).rstrip(".")
        if self._losses[index] > MOST_LOSSES:
            raise DiffuMaskError(
                f"{self._losses[index]} workers of Ray were lost {what} ({cause}): see what ended them, often memory, "
                "and run the same command again to finish"
            )
        logger.warning("a worker of Ray was lost %s, which another one draws anew (%s)", what, cause)
        self._ready = [one for one in self._ready if one != worker]
        self._ray.kill(worker)
        self._start()

    def _get(self, call: Any) -> Any:
        """Return what a call gave; an error of our own is raised as it was."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def _stop(self) -> None:
        for worker in [*self._ready, *self._beginning.values()]:
            self._ray.kill(worker)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DiffuMaskError(f"`ray` needs Ray ({error}): pip install 'diffumask-fast[ray]'") from error
    return ray


def _for_workers(options: GenerateOptions) -> GenerateOptions:
    """Return options that mean the same in another working directory; captions are not looked for there."""
    given = {name: getattr(options, name) for name in ("model", "classes", "engine_path", "model_options")}
    if options.classes is not None and not is_file(options.classes):
        del given["classes"]
    paths = {name: Path(value).expanduser() for name, value in given.items() if value is not None}
    absolute: dict[str, Any] = {
        name: str(path.absolute() if path.exists() else given[name]) for name, path in paths.items()
    }
    prompts = PromptOptions(options.prompts.sub_classes)
    return replace(options, part=None, prompts=prompts, lora=tuple(map(absolute_text, options.lora)), **absolute)


def _options_of(text: str) -> GenerateOptions:
    values = {"out": ".", **json.loads(text)}
    made = {
        "prompts": PromptOptions(**values["prompts"]),
        "maps": MapOptions(**values["maps"]),
        "mask": replace(GenerateOptions.mask, **values["mask"]),
    }
    return GenerateOptions(**{**values, **made})


@contextmanager
def _connected(ray: Any, options: GenerateOptions) -> Iterator[None]:
    """Join a cluster, or start one on this machine; where the process has joined one already, that one is used."""
    log = logging.getLogger("ray")
    level, own = log.level, not ray.is_initialized()
    log.setLevel(logging.ERROR)
    try:
        with patched("_worker_logs_enabled", {ray._private.worker: False}):
            if own:
                _join(ray, options)
            yield
    finally:
        if own:
            ray.shutdown()
        log.setLevel(level)


def _join(ray: Any, options: GenerateOptions) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if options.ray == "local":
        cores = max(options.workers or 1, len(os.sched_getaffinity(0)))
        settings |= {"num_cpus": cores, "include_dashboard": False}
    try:
        with patched_environment(STATISTICS, os.environ.get(STATISTICS, "0")):  # nothing is sent unless one wants it
            ray.init(address=options.ray, **settings)
    except Exception as error:  # Ray has no class of its own for what goes wrong here
        cause = in_one_line(error)
        raise DiffuMaskError(
            f"no Ray cluster can be joined at `ray={options.ray}` ({cause}): try again, set RAY_AUTH_MODE=token where "
            "the cluster wants a token, or use another address"
        ) from error


def _place(resources: dict[str, float], options: GenerateOptions) -> tuple[str, int]:
    """Return where the workers draw, and how many there are: one for each GPU, else for each CPU."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if options.device.startswith("cuda") and not gpus:
        raise DiffuMaskError(f"Ray sees no GPU in its cluster, but {cpus} CPUs: use `device=cpu`")
    device = "cpu" if options.device == "cpu" or not gpus else "cuda"
    return device, options.workers or (gpus if device == "cuda" else cpus) or 1
