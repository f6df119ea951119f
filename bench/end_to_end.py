"""Whole runs beside each other: ours, plain diffusers, the reference program's store, DAAM-style capture and a peer."""

import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.bench import baselines, memory
from diffumask_fast.bench.contenders import REFERENCE_MAPS, REFERENCE_MASK, Contenders, mask_iou
from diffumask_fast.bench.geometries import check_geometry, check_memory, open_geometry
from diffumask_fast.bench.harness import Race, Workload, race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.engines.compiled import compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.device import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline

logger = logging.getLogger("diffumask_fast")

SUITE = "end_to_end"
OVERHEADS = ("maps_overhead", "propagation_overhead", "masks_overhead")
RACED = ("speedup_vs_reference_fp32", "speedup_vs_reference_best", "speedup_vs_daam", "speedup_vs_peer")
SPEEDUPS = (*RACED, "speedup_vs_reference_with_masks", "iou_vs_reference")
MEMORY = ("peak_memory_vs_reference", "memory_vs_steps")
ROWS = (*OVERHEADS, *SPEEDUPS, *MEMORY)
UNREPEATED = ("seconds_plain", "seconds_ours", "seconds_reference", "peak_memory_vs_reference")
LIBRARIES = {"speedup_vs_peer": "attention_map_diffusers", "speedup_vs_reference_with_masks": "pydensecrf"}
ENGINES = ("torch", "compile", "onnx")


def run(
    geometry: str = "mini",
    device: str | torch.device = "auto",
    *,
    model: str | Path | None = None,
    names: Sequence[str] | None = None,
    batch: int = 8,
    steps: int | None = None,
    mask_steps: int | None = None,
    pairs: int | None = None,
    engines: Sequence[str] = ("torch", "compile"),
    pipe: DiffuMaskPipeline | None = None,
) -> Iterator[dict]:
    """Measure whole runs; what cannot be measured is refused before anything long starts.

    `maps_overhead` and `propagation_overhead` compare the denoising alone: the costs shared with the plain pipeline
    after it (VAE, PIL) would make them look smaller. `masks_overhead` compares finished images with finished images and
    masks. The speed-ups are the other contender's time for an image over ours: images and masks by both, ours in its
    best engine, the same latents, steps and threshold. A large geometry on the CPU gets one run of each contender.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        model: another model folder of the same geometry.
        names: which rows; None is all that this machine can measure.
        batch: images per call, but for the contenders that draw one.
        steps: denoising steps; None is 3 for the overheads of the denoising, 8 for the speed-ups, 2 for single runs.
        mask_steps: denoising steps of `masks_overhead`; None is 5 on the CPU and the model's own elsewhere.
        pairs: rounds of a comparison; None is the harness' number for the device.
        engines: candidates for our best: "torch", "compile" (torch.compile), "onnx".
        pipe: the geometry, where it is open already.

    Returns:
        One row per name, as each is finished.

    Raises:
        DiffuMaskError: an unknown geometry, row or engine, a baseline's library that is missing, too little memory.
    """
    check_geometry(geometry)
    device = resolve_device(device)
    unrepeated = geometry != "mini" and device.type == "cpu"
    names = _available(UNREPEATED if unrepeated else ROWS, names)
    if unknown := [name for name in engines if name not in ENGINES]:
        raise DiffuMaskError(f"There is no engine {unknown[0]} to compare: use {', '.join(ENGINES)}.")
    if geometry != "mini" and model is None:
        check_memory(geometry, device, reference=any("reference" in name for name in names))
    config = {"geometry": geometry, "model": str(model) if model else geometry}
    if unrepeated:
        return _once(names, geometry, model, steps or 2, config)
    config |= environment(device)
    pipe = pipe or open_geometry(geometry, device, model=model)
    return _Comparison(geometry, device, model, batch, steps, mask_steps, pairs, engines, config, pipe).rows(names)


def _available(known: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """Check the names of rows, or take all whose baselines are installed, and log which are left out."""
    for name in names or ():
        if name not in known:
            raise DiffuMaskError(f"There is no row {name} in {SUITE} here: use {', '.join(known)}.")
        if name in LIBRARIES:
            baselines.needs(LIBRARIES[name])
    if names:
        return tuple(names)
    absent = {name: sentence for name in known if (sentence := baselines.missing(LIBRARIES.get(name, "torch")))}
    for name, sentence in absent.items():
        logger.warning("%s is left out: %s", name, sentence)
    return tuple(name for name in known if name not in absent)


def _once(
    names: Sequence[str], geometry: str, model: str | Path | None, steps: int, config: dict[str, Any]
) -> Iterator[dict]:
    """Run each contender once, one image, all threads; wall clock, and the live tensors of the denoising."""
    contenders = Contenders(open_geometry(geometry, "cpu", model=model), 1, steps)
    config |= {"batch": 1, **contenders.settings, "clock": "wall", "repeated": False}
    config |= environment("cpu", torch.get_num_threads())
    calls = {
        "seconds_plain": contenders.plain("pil"),
        "seconds_ours": contenders.ours(),
        "seconds_reference": contenders.reference(),
    }
    for name in names:
        if name in calls:
            start = time.perf_counter()
            calls[name]()
            yield row(SUITE, name, time.perf_counter() - start, unit="s/image", config=config)
        else:
            value, sizes = memory.against_reference(contenders)
            yield row(SUITE, name, value, config={**config, **sizes})


@dataclass
class _Comparison:
    """The rows of one geometry on one device; what several rows share is made once."""

    geometry: str
    device: torch.device
    model: str | Path | None
    batch: int
    steps: int | None
    mask_steps: int | None
    pairs: int | None
    engines: Sequence[str]
    config: dict[str, Any]
    pipe: DiffuMaskPipeline

    def rows(self, names: Sequence[str]) -> Iterator[dict]:
        """Measure in groups that share their rounds."""
        if set(OVERHEADS) & set(names):
            yield from self._overheads(names)
        if set(SPEEDUPS) & set(names):
            yield from self._speedups(names)
        if "peak_memory_vs_reference" in names:
            value, sizes = memory.against_reference(Contenders(self.pipe, 1, 2))
            yield row(SUITE, "peak_memory_vs_reference", value, config={**self.config, "batch": 1, **sizes})
        if "memory_vs_steps" in names:
            few, many = memory.over_steps(self.pipe)
            config = {**self.config, "batch": 1, "steps": [few[0], many[0]], "peak_bytes": [few[1], many[1]]}
            yield row(SUITE, "memory_vs_steps", many[1] / few[1], config=config)

    def _overheads(self, names: Sequence[str]) -> Iterator[dict]:
        on_cpu = self.device.type == "cpu"
        mask_steps = self.mask_steps or self.steps or (5 if on_cpu else self.pipe.info.num_inference_steps)
        drawn, finished = (Contenders(self.pipe, self.batch, steps) for steps in (self.steps or 3, mask_steps))
        kinds = {"maps_overhead": "none", "propagation_overhead": self.pipe.map_options().propagate}
        kinds = {name: propagate for name, propagate in kinds.items() if name in names}
        calls: dict[str, Workload] = {}
        if kinds:
            calls |= {"plain": drawn.plain(), **{name: drawn.mapped(propagate) for name, propagate in kinds.items()}}
        if kinds and not on_cpu and importlib.util.find_spec("xformers"):
            calls["plain_xformers"] = drawn.plain_with("xformers")
        if "masks_overhead" in names:
            calls |= {"images": finished.seeded(False), "masks_overhead": finished.seeded(True)}
        timed = race(calls, control=next(iter(calls)), pairs=self.pairs, device=self.device)
        if "plain_xformers" in calls:
            yield row(SUITE, "plain_xformers", timed.ratio("plain_xformers", "plain"), config=self._config(drawn))
        for name, propagate in kinds.items():
            config = {**self._config(drawn), "output": "latent", "propagate": propagate}
            yield row(SUITE, name, timed.ratio(name, "plain"), config=config)
        if "masks_overhead" in names:
            config = {**self._config(finished), "output": "pil", "mask": _flat(self.pipe.map_options(), MaskOptions())}
            yield row(SUITE, "masks_overhead", timed.ratio("masks_overhead", "images"), config=config)

    def _speedups(self, names: Sequence[str]) -> Iterator[dict]:
        contenders = Contenders(self.pipe, self.batch, self.steps or 8)
        tried: dict[str, float] = {}
        half = "bf16" if self.device.type == "cpu" else "fp16"
        fp32, fp32_engine = self._best_engine("fp32", tried)
        best, best_engine = fp32, fp32_engine
        if "speedup_vs_reference_best" in names:
            best, best_engine = self._best_engine(half, tried)
        contenders.pipe = fp32 if self.pipe.pipe.unet.dtype != torch.float32 else self.pipe
        calls: dict[str, Workload] = {
            "ours": contenders.ours(fp32),
            "best": contenders.ours(best),
            "reference": contenders.reference(),
        }
        calls |= {"daam": contenders.daam(), "peer": contenders.peer()}
        wanted = {"ours"} | {name.rpartition("_")[2] for name in names if name in RACED}
        wanted |= {"reference"} if any("reference" in name for name in names) else set()
        calls = {name: call for name, call in calls.items() if name in wanted}
        control = "reference" if "reference" in calls else "ours"
        timed = race(calls, control=control, pairs=self.pairs, device=self.device)
        shared = {
            **self._config(contenders),
            "mask": _flat(REFERENCE_MAPS, REFERENCE_MASK),
            "tried_s": tried,
            "engine": fp32_engine,
            "dtype": "fp32",
            "s_per_image": round(timed.seconds("ours") / self.batch, 5),
        }
        if "speedup_vs_reference_fp32" in names:
            yield row(SUITE, "speedup_vs_reference_fp32", timed.ratio("reference", "ours", self.batch), config=shared)
        if "speedup_vs_daam" in names:
            yield row(SUITE, "speedup_vs_daam", timed.ratio("daam", "ours", self.batch), config=shared)
        if "speedup_vs_peer" in names:
            yield row(SUITE, "speedup_vs_peer", timed.ratio("peer", "ours"), config={**shared, "peer_version": "1.0.0"})
        shared["engine"] = best_engine
        yield from self._against_masks(names, contenders, timed, best, shared, half)

    def _against_masks(
        self,
        names: Sequence[str],
        contenders: Contenders,
        timed: Race,
        best: DiffuMaskPipeline,
        config: dict[str, Any],
        half: str,
    ) -> Iterator[dict]:
        """Yield the rows that need the reference's own masks."""
        alike = [name for name in ("speedup_vs_reference_best", "iou_vs_reference") if name in names]
        theirs = [contenders.reference(index)() for index in range(self.batch)] if alike else []
        if "speedup_vs_reference_best" in names:
            ious = mask_iou(contenders.ours(best)(), theirs)
            extra = {"dtype": half, "mask_iou": round(sum(ious) / self.batch, 5)}
            extra["s_per_image"] = round(timed.seconds("best") / self.batch, 5)
            ratio = timed.ratio("reference", "best", self.batch)
            yield row(SUITE, "speedup_vs_reference_best", ratio, config=config | extra)
        if "iou_vs_reference" in names:
            ious = mask_iou(contenders.ours_by_token(), theirs)
            by_phrase = mask_iou(contenders.ours(self.pipe)(), theirs)
            config = {**config, "engine": "torch", "by_phrase": round(sum(by_phrase) / self.batch, 5)}
            spread: dict[str, Any] = {"low": min(ious), "high": max(ious), "n": self.batch}
            yield row(SUITE, "iou_vs_reference", sum(ious) / self.batch, **spread, config=config)
        if "speedup_vs_reference_with_masks" in names:
            whole = contenders.ours(self.pipe, like_reference=False)
            whole()
            start = time.process_time()
            whole()
            ours, crf = (time.process_time() - start) / self.batch, contenders.crf_seconds()
            config = {**config, "engine": "torch", "crf_s": round(crf, 3), "s_per_image": round(ours, 5)}
            config |= {"mask": _flat(self.pipe.map_options(), MaskOptions()), "clock": timed.clock}
            value = (timed.seconds("reference") + crf) / ours
            yield row(SUITE, "speedup_vs_reference_with_masks", value, config=config)

    def _best_engine(self, dtype: str, tried: dict[str, float]) -> tuple[DiffuMaskPipeline, str]:
        """Return the quickest of the engines for a precision; what each took is written into `tried`."""
        pipes: dict[str, tuple[float, DiffuMaskPipeline]] = {}
        for engine in self.engines:
            pipe = self._with_engine(engine, dtype)
            if pipe is not None:
                pipes[engine] = (self._probe(pipe), pipe)
                tried[f"{engine} {dtype}"] = round(pipes[engine][0], 4)
        engine = min(pipes, key=lambda name: pipes[name][0])
        return pipes[engine][1], engine

    def _with_engine(self, engine: str, dtype: str) -> DiffuMaskPipeline | None:
        if engine == "onnx":
            fits = dtype == "fp32" and self.device.type == "cpu"
            return _onnx(self.model or self.geometry, self.batch) if fits else None
        pipe = open_geometry(self.geometry, self.device, model=self.model, dtype=dtype)
        if engine == "compile":
            try:
                return DiffuMaskPipeline(pipe.pipe, pipe.info, compiled=compile_pipe(pipe.pipe))
            except DiffuMaskError as error:
                logger.warning("the compiled engine is left out: %s", error)
                return None
        return pipe

    def _probe(self, pipe: DiffuMaskPipeline) -> float:
        """Time two steps once after a warm-up, which also compiles; one thread, as the race."""
        call = Contenders(self.pipe, self.batch, 2).ours(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the compiler's advice about diffusers
            timed = race({"call": call}, pairs=3, device=self.device)
        return min(timed.times["call"])

    def _config(self, contenders: Contenders) -> dict[str, Any]:
        return {**self.config, "batch": self.batch, **contenders.settings}


def _flat(maps: MapOptions, mask: MaskOptions) -> dict[str, Any]:
    return {**vars(maps), **vars(mask)}


def _onnx(model: str | Path, batch: int) -> DiffuMaskPipeline:
    """Export a model to a temporary folder, and open it while the folder is there."""
    import tempfile

    from diffumask_fast.export.onnx_export import export_onnx
    from diffumask_fast.export.options import ShapeOptions

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "engine", shapes=ShapeOptions(max_batch=batch))
        pipe = DiffuMaskPipeline.from_pretrained(model, engine="onnx", engine_path=Path(folder) / "engine")
        pipe.pipe.set_progress_bar_config(disable=True)
        return pipe
