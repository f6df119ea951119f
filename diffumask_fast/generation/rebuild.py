"""What `diffumask-fast verify --rebuild` does: draw one sample's batch once more, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.borrow import patched_threads
from diffumask_fast.dataset.folder import differences
from diffumask_fast.dataset.reader import Row, read_manifest, read_shard
from diffumask_fast.dataset.schema import decode_maps, decode_png, make_row
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.dataset.writer import shard_path
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.captions import kept_captions
from diffumask_fast.generation.draw import draw_batches
from diffumask_fast.generation.generate import environment
from diffumask_fast.generation.job import Job, open_pipe
from diffumask_fast.generation.options import RebuildOptions
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.device import DTYPES
from diffumask_fast.models.loading import quietly
from diffumask_fast.models.lora import Lora, split_scale
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.planner import Recipe
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary

NEEDED = ("classes_per_image", "seed", "batch_size", "steps", "guidance_scale", "scheduler", "size", "dtype", "engine")
JUDGED_AGAIN = ("accepted", "reason")  # by `filter`, whose pixels are those that were drawn
LEAST_IOU = 0.9  # of a batch's masks: below it, another environment's rounding explains nothing


def rebuild(
    source: str | Place, key: str, options: RebuildOptions | None = None, *, max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """Draw the batch of a sample once more, with what `dataset.json` records, and compare it with what is stored.

    Torch gets the number of threads that the dataset was drawn with.

    Args:
        source: what `generate` wrote, or what `remask` or `filter` made of it.
        key: of the sample.
        options: where the model and its engine are, and where to draw.
        max_pixels: of a picture that is decoded.

    Returns:
        folder, key, batch (the keys that are drawn with it), equal (whether every byte of the batch is), differs (the
        columns of the sample that differ), mask_iou (of the sample's mask, mean over its classes), batch_mask_iou (the
        mean over the batch), environment (name -> how it differs from the one that drew; empty where bytes must be
        equal), fault (a sentence where what is drawn is not what is stored: a byte differs in the same environment, or
        elsewhere the masks of the batch have a mean IoU below 0.9; else "").

    Raises:
        DiffuMaskError: there is no such key, the dataset was not drawn by `generate`, its model cannot be loaded or
            has other weights, or it plans other samples.
    """
    options, folder = options or RebuildOptions(), place(source)
    manifest = read_manifest(folder)
    recorded = job_of(folder, manifest, options)
    job, shard, number, stored = _stored(folder, manifest, recorded, key, max_pixels)
    drift = _drift(manifest, shard)
    drew = drift.get("environment", manifest["environment"])
    with quietly(), patched_threads(drew["threads"]):
        pipe = _open(folder, job, options)
        job = replace(job, recipe=replace(job.recipe, scenes=pipe.info.scenes))
        batch = next(islice(job.batches(job.plan(pipe), shard), number, None))
        _check_plan(folder, batch, stored)
        with closing(draw_batches(pipe, job, [batch])) as results:
            drawn = [make_row(result) for result in results]
        changes = dict(differences(drew, environment(pipe)))
    if "batch_size" in drift:
        changes["batch_size"] = f"was {recorded.batch_size} until memory ran out"
    judged_again = JUDGED_AGAIN if manifest["options"].keys() - job.options.keys() - {"shard_size"} else ()
    pairs = {row.key: (row, values) for row, values in zip(stored, drawn, strict=True)}
    differs = {
        name: [c for c in pair[1] if c not in judged_again and not _same(*pair, c)] for name, pair in pairs.items()
    }
    ious = {name: _mask_iou(*pair) for name, pair in pairs.items()}
    summary = {
        "folder": str(source), "key": key, "batch": list(pairs), "equal": not any(differs.values()),
        "differs": differs[key], "mask_iou": ious[key], "batch_mask_iou": sum(ious.values()) / len(ious),
        "environment": changes,
    }  # fmt: skip
    return {**summary, "fault": _fault(summary, {name: columns for name, columns in differs.items() if columns})}


def told(summary: Mapping[str, Any]) -> list[str]:
    """Return what a command says of the summary of `rebuild`."""
    size = len(summary["batch"])
    where = "in the same environment" if not summary["environment"] else "in another environment"
    lines = [f"{name} {change}" for name, change in summary["environment"].items()]
    if summary["equal"]:
        return [*lines, f"{summary['key']} and its batch of {size}, drawn again {where}: every byte is equal."]
    ious = f"mask IoU {summary['mask_iou']:.4f}, mean of its batch of {size} {summary['batch_mask_iou']:.4f}"
    return [
        *lines,
        f"{summary['key']}, drawn again {where}: {ious}; differs in {', '.join(summary['differs']) or 'nothing'}.",
    ]


def job_of(folder: Place, manifest: Mapping[str, Any], options: RebuildOptions) -> Job:
    """Return the job that a dataset records; its scenes are the model's, which it does not record.

    Args:
        folder: of the dataset, named in errors.
        manifest: its `dataset.json`.
        options: where the model and its engine are.

    Raises:
        DiffuMaskError: it is not one that `generate` drew, or the captions that it was drawn from are gone.
    """
    recorded, plan, model = manifest["options"], manifest["plan"], manifest["model"].get("id")
    if "augment" in recorded:
        raise DiffuMaskError(f"{folder} is augmented: redraw a sample of the dataset that it was made of")
    if "affinity" in recorded:
        raise DiffuMaskError(f"{folder} has masks by affinity: redraw a sample of the dataset that it was made of")
    if model is None or not all(name in recorded for name in NEEDED):
        raise DiffuMaskError(f"{folder} was not drawn by generate, so no sample of it can be drawn again")
    vocabulary = Vocabulary(tuple(ClassEntry(**entry) for entry in manifest["classes"]))
    rounds = [tuple(part["classes"].get(name, 0) for name in vocabulary.names) for part in plan.get("rounds", ())]
    recipe: dict[str, Any] = {name: recorded[name] for name in ("seed", "classes_per_image")}
    recipe |= {"num": plan["rows"], **({"rounds": tuple(rounds)} if rounds else {})}
    recipe["retrieved"] = kept_captions(folder, manifest)
    height, width = map(int, recorded["size"].split("x"))
    return Job(
        model=options.model or model,
        revision=recorded.get("revision"),
        scheduler=recorded["scheduler"],
        dtype=next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{recorded['dtype']}"),
        engine=recorded["engine"],
        engine_path=None if options.engine_path is None else str(options.engine_path),
        attention=recorded.get("attention", "sdpa"),
        identity=model,
        weights=manifest["model"]["weights"],
        engine_sha256=recorded.get("engine_sha256"),
        recipe=Recipe(vocabulary, **recipe),
        batch_size=recorded["batch_size"],
        steps=recorded["steps"],
        guidance_scale=recorded["guidance_scale"],
        height=height,
        width=width,
        maps=_made(MapOptions, recorded),
        mask=_made(MaskOptions, recorded),
        shard_size=recorded["shard_size"],
        loras=_loras(folder, recorded, options.lora),
    )


def _loras(folder: Place, recorded: Mapping[str, Any], given: Sequence[str]) -> tuple[Lora, ...]:
    """Return the LoRA files that a dataset records, each where it is now."""
    named, places = [split_scale(text) for text in recorded.get("lora", ())], [split_scale(text) for text in given]
    if given and len(given) != len(named):
        raise DiffuMaskError(
            f"{folder} was drawn with {len(named)} LoRA files, and `lora` names {len(given)}: give all in their order"
        )
    if lost := [name for name, _ in named if not given and "/" not in name]:  # with a slash it is one of the hub
        raise DiffuMaskError(f"{folder} was drawn with the LoRA {lost[0]}: say by `lora` where it is now")
    if other := [
        text for text, (_, scale), (_, asked) in zip(given, named, places, strict=False) if asked not in (1, scale)
    ]:
        raise DiffuMaskError(f"{folder} records the scales of its LoRA files: leave that of {other[0]} out of `lora`")
    hashes = recorded.get("lora_sha256", {})
    return tuple(
        Lora(name, place, scale, hashes[name]) for (name, scale), (place, _) in zip(named, places or named, strict=True)
    )


def _made(kind: type[Any], recorded: Mapping[str, Any]) -> Any:
    """Make options of what is recorded; one that older versions did not have was then what is its default now."""
    return kind(**{one.name: recorded[one.name] for one in fields(kind) if one.name in recorded})


def _stored(
    folder: Place, manifest: Mapping[str, Any], job: Job, key: str, max_pixels: int
) -> tuple[Job, int, int, list[Row]]:
    """Return the job as a sample's shard was drawn, the numbers of shard and batch, and the rows of the batch."""
    for index in range(manifest["plan"]["shards"]):
        path = shard_path(folder, index)
        keys = [row.key for row in read_shard(path, ["key"])] if path.exists() else []
        if key in keys:
            job = replace(job, batch_size=_drift(manifest, index).get("batch_size", job.batch_size))
            batch = keys.index(key) // job.batch_size
            rows = islice(read_shard(path, max_pixels=max_pixels), batch * job.batch_size, (batch + 1) * job.batch_size)
            return job, index, batch, list(rows)
    raise DiffuMaskError(f"{folder} holds no sample {key}: give one of its keys, such as dog-000042")


def _drift(manifest: Mapping[str, Any], shard: int) -> dict[str, Any]:
    """Return what is recorded of how a shard was drawn, where that is not as the run began."""
    return next((drift for drift in reversed(manifest.get("drift", [])) if shard in drift["shards"]), {})


def _open(folder: Place, job: Job, options: RebuildOptions) -> DiffuMaskPipeline:
    """Load the pipeline that drew a dataset."""
    try:
        pipe = open_pipe(job, options.device)
    except DiffuMaskError as error:
        if options.model is not None:
            raise
        text = str(error).rstrip(".")
        raise DiffuMaskError(f"{text}; where the model that drew {folder} has moved, name it by `model`") from error
    if pipe.weights != job.weights:
        raise DiffuMaskError(
            f"the weights of {job.model} are not those that drew {folder}: name the model that did by `model`"
        )
    if changed := job.changed_lora(pipe):
        raise DiffuMaskError(f"the LoRA {changed} is not the file that drew {folder}: name that one by `lora`")
    if job.engine_sha256 not in (None, pipe.engine and pipe.engine.sha256):
        raise DiffuMaskError(f"{job.engine_path} is not the engine that drew {folder}: name that one by `engine_path`")
    return pipe


def _check_plan(folder: Place, batch: Sequence[Request], stored: Sequence[Row]) -> None:
    """Raise unless the samples that are planned now are those that are stored."""
    names = ("key", "prompt", "negative_prompt", "seed")
    for request, row in zip_longest(batch, stored):
        if None in (request, row) or any(getattr(request, name) != row.values[name] for name in names):
            raise DiffuMaskError(
                f"{folder} holds other samples than are planned now: the model's scenes or tokenizer, or this "
                "program's, changed; bring back the old ones"
            )


def _same(row: Row, drawn: Mapping[str, Any], name: str) -> bool:
    """Tell whether a stored row has the same value in a column as one that is drawn."""
    there, now = row.values[name], drawn[name]
    if name == "maps":
        return np.array_equal(np.asarray(row.maps), np.asarray(decode_maps(dict(drawn))))
    if name == "quality":
        return np.array_equal(np.float32(there), np.float32(now), equal_nan=True)
    return there["bytes"] == now["bytes"] if name in ("image", "mask") else there == now


def _mask_iou(row: Row, drawn: Mapping[str, Any]) -> float:
    """Return the IoU of a stored mask and a drawn one, the mean over the row's classes."""
    there, now = row.mask, decode_png(drawn["mask"], row.max_pixels)
    ious = []
    for class_id in row.class_ids:
        both, one = (there == class_id) & (now == class_id), (there == class_id) | (now == class_id)
        ious.append(float(both.sum() / one.sum()) if one.any() else 1.0)
    return sum(ious) / len(ious)


def _fault(summary: Mapping[str, Any], wrong: Mapping[str, Sequence[str]]) -> str:
    """Say what is wrong with what was drawn; "" where nothing is.

    Args:
        summary: of `rebuild`.
        wrong: key -> columns that differ.
    """
    if not summary["environment"] and wrong:
        key, columns = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more of its batch" if len(wrong) > 1 else ""
        what = f"{key}{more}, drawn again in the same environment, is not what is stored ({', '.join(columns)})"
    elif summary["batch_mask_iou"] < LEAST_IOU:
        what = f"masks drawn again have an IoU of {summary['batch_mask_iou']:.2f} with those that are stored"
    else:
        return ""
    return f"{summary['folder']}: {what}; delete the shard and run the command again that wrote the dataset"
