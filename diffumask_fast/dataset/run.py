"""A run in a folder: what it was asked for, which shards are there, which are missing."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from diffumask_fast.dataset.finish import finish
from diffumask_fast.dataset.folder import DatasetPlace, differences, open_folder
from diffumask_fast.dataset.parts import Part
from diffumask_fast.dataset.reader import Row, read_manifest, read_paths, shard_paths
from diffumask_fast.dataset.schema import SCHEMA_VERSION, Sample, make_row
from diffumask_fast.dataset.shard_check import UNRECORDED, PlanDigest, digest_plan, done_shards, mark_of
from diffumask_fast.dataset.storage import Place
from diffumask_fast.dataset.writer import dump_manifest, shard_name, shard_path, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import checked, whole
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary

Rounds = Sequence[Mapping[str, int]]


def open_run(
    folder: str | Place,
    requests: Sequence[Request],
    options: dict[str, Any],
    environment: dict[str, Any],
    shard_size: int = 64,
    allow_drift: bool = False,
    *,
    model: dict[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    rounds: Rounds = (),
    part: Part | None = None,
    captions: bytes | None = None,
) -> "Run":
    """Begin a run in a folder, or go on with the one that is there.

    `dataset.json` is written before the first shard; it never changes afterwards, except that a tolerated drift or a
    round is added. What a killed run left half-written is removed, and a shard that does not decode is drawn anew: of
    a large run that is looked for in footers, keys and seeds alone. The run is locked against other processes until it
    is finished or the process ends; a part of it against the same part.

    Args:
        folder: made if needed.
        requests: all samples in order; their keys are unique. A lazy sequence is read once, and shard by shard.
        options: every option that makes a difference to the data, `auto` resolved, named as on the command line with
            underscores; values that JSON can hold.
        environment: device, threads, versions: what may change rounding.
        shard_size: rows of a shard; becomes an option.
        allow_drift: go on in another environment and record it under `drift`, with the shards that were missing.
        model: `{"id": ..., "weights": hash}`.
        vocabulary: recorded under `classes`.
        rounds: how many requests of each class each round has, where the run grows by rounds; see `Run.extend`.
        part: whose shards alone are looked at and written; None is all. It is not recorded.
        captions: what the prompts were taken from; kept in the folder, whose options record their hash.

    Returns:
        The run, to be used in a `with` statement.

    Raises:
        DiffuMaskError: the folder cannot be written or is in use, holds a run with another model, option, plan or
            environment (the message names each difference), or holds shards of another run.
    """
    shard_size = checked("shard_size", shard_size, whole(1))
    if not requests:
        raise DiffuMaskError("a run needs at least one request")
    plan, planned = _planned(requests, shard_size, rounds)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": model or {},
        "options": {**options, "shard_size": shard_size},
        "classes": [entry.as_json() for entry in (vocabulary.entries if vocabulary else ())],
        "plan": planned,
        "environment": environment,
    }
    # Read back, so that both sides of the comparison have JSON's types.
    manifest = json.loads(dump_manifest(manifest))
    place = open_folder(folder, part)
    try:
        begun = _begin(place, manifest, allow_drift, plan, captions)
        return Run(place, requests, shard_size, manifest["environment"], *begun)
    except BaseException:
        place.close()
        raise


class Run:
    """The shards of one run, or of a part of it; made by `open_run`."""

    def __init__(
        self,
        place: DatasetPlace,
        requests: Sequence[Request],
        shard_size: int,
        environment: dict[str, Any],
        manifest: dict[str, Any],
        done: Collection[int],
    ):
        self.folder, self.requests, self.shard_size, self.manifest = place.path, requests, shard_size, manifest
        self.part, self.shards = place.part, _shards(manifest, place.part)
        self._environment = environment
        self._place, self._done = place, set(done)

    def missing_shards(self) -> list[int]:
        """List the shards that are still to be drawn here."""
        return [index for index in self.shards if index not in self._done]

    def num_missing(self) -> int:
        """Count the shards of the whole run that are not there yet, whoever is to draw them."""
        there = {path.name for path in shard_paths(self.folder)}
        return sum(shard_name(index) not in there for index in range(self.manifest["plan"]["shards"]))

    def requests_of(self, index: int) -> tuple[Request, ...]:
        """Return the requests of a shard."""
        return tuple(self.requests[index * self.shard_size : (index + 1) * self.shard_size])

    def batch_sizes(self) -> dict[int, int | None]:
        """Return the batch size that each shard was reduced to for want of memory; those that were not have none."""
        return {index: one.get("batch_size") for one in self.manifest.get("drift", []) for index in one["shards"]}

    def reduce_batch_size(self, batch_size: int, shards: Sequence[int]) -> None:
        """Record under `drift` that shards are drawn in smaller batches than the options say: equal up to rounding.

        Args:
            batch_size: of those shards.
            shards: that are still to be drawn.
        """
        drift = {"environment": self._environment, "batch_size": batch_size, "shards": list(shards)}
        with self._place.ending():
            self.manifest = _add_drift(self._place, read_manifest(self.folder), drift)

    def extend(self, requests: Sequence[Request], rounds: Rounds) -> None:
        """Add a round: what is there stays, and its shards with it.

        Args:
            requests: all of the run, those of the new round at the end.
            rounds: of all of them; those before the new one are whole shards.

        Raises:
            DiffuMaskError: they do not begin with those that the run has.
        """
        _, plan = _planned(requests, self.shard_size, rounds)
        there = self.manifest["plan"].get("rounds", [])
        if plan["rounds"][: len(there)] != there or there and there[-1]["rows"] % self.shard_size:
            raise DiffuMaskError(f"the rounds of {self.folder} are not those that the new one follows")
        self.manifest["plan"], self.requests = plan, requests
        self.shards = _shards(self.manifest, self.part)
        self._place.write_manifest(self.manifest)

    def write(self, index: int, samples: Sequence[Sample]) -> Place:
        """Write a whole shard.

        Args:
            index: of the shard.
            samples: one for each of its requests, in their order.

        Raises:
            DiffuMaskError: the samples are not those of the shard, or it cannot be written.
        """
        if [sample.request for sample in samples] != list(self.requests_of(index)):
            raise DiffuMaskError(f"shard {index} takes the samples of its requests, all of them and in their order")
        return self.write_rows(index, [make_row(sample) for sample in samples])

    def write_rows(self, index: int, rows: Sequence[dict[str, Any]]) -> Place:
        """Write a whole shard of rows that are already encoded, as `write`."""
        names = [(row["key"], row["seed"]) for row in rows]
        if names != [(request.key, request.seed) for request in self.requests_of(index)]:
            raise DiffuMaskError(f"shard {index} takes the rows of its requests, all of them and in their order")
        if index not in self.shards:
            raise DiffuMaskError(f"shard {index} is none of part {self.part}: another part writes it")
        path = write_shard(self.folder, index, rows, mark_of(self.manifest, index, names), self._place.tag)
        self._done.add(index)
        return path

    def rows(self, *, accepted_only: bool = True, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows that are there, of the part's shards."""
        paths = [shard_path(self.folder, index) for index in sorted(self._done)]
        return read_paths(paths, accepted_only=accepted_only, columns=columns)

    def accepted_flags(self) -> list[bool]:
        """Tell of each row that is there whether it is accepted."""
        return [row.accepted for row in self.rows(accepted_only=False, columns=["accepted"])]

    def show(self, origin: Place | None, max_pixels: int) -> int:
        """Write what the run shows to people if all of it is there; return the number of shards that it lacks.

        Args:
            origin: as for `finish`.
            max_pixels: of a picture that is decoded.
        """
        with self._place.ending():
            missing = self.num_missing()
            if not missing:
                finish(self.folder, origin, max_pixels=max_pixels, tag=self._place.tag)
        return missing

    def close(self) -> None:
        """Unlock the folder."""
        self._place.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _planned(requests: Sequence[Request], shard_size: int, rounds: Rounds) -> tuple[PlanDigest, dict[str, Any]]:
    """Return the hashes of a plan, and what `dataset.json` says of it: of each round, the plan as it was then."""
    ends = list(accumulate(sum(counts.values()) for counts in rounds))
    digest = digest_plan(requests, shard_size, set(ends))
    plan: dict[str, Any] = {"rows": len(requests), "shards": len(digest.shards), "sha256": digest.sha256}
    if rounds:
        plan["rounds"] = [
            {"rows": rows, "shards": -(-rows // shard_size), "sha256": sha256, "classes": dict(counts)}
            for rows, sha256, counts in zip(ends, digest.rounds, rounds, strict=True)
        ]
    return digest, plan


def _begin(
    place: DatasetPlace, manifest: dict[str, Any], allow_drift: bool, plan: PlanDigest, captions: bytes | None
) -> tuple[dict[str, Any], set[int]]:
    """Write the manifest, or compare it with the one that is there; return the one that holds, and the shards done."""
    with place.beginning() as free:
        there = place.begun(free)
        if there is None:  # no shard was drawn yet, so other options may begin anew
            there = place.write_first(manifest)
        if there is not None:
            _compare(there, manifest, place.path)
        if captions is not None:
            place.keep_captions(captions)
        if there is None:
            return manifest, set()
    changes = _named(there["environment"], manifest["environment"])
    if changes and not allow_drift:
        raise DiffuMaskError(
            f"{place.path} was begun in another environment: {', '.join(changes)}; with `allow_drift` the run goes on, "
            "equal up to rounding, and records it"
        )
    shards = _shards(there, place.part)
    done = done_shards(place.path, there, plan.shards.__getitem__, shards)
    if missing := [index for index in shards if index not in done]:
        with place.ending():
            there = read_manifest(place.path)
            if (there.get("drift") or [there])[-1]["environment"] != manifest["environment"]:  # of the last who went on
                there = _add_drift(place, there, {"environment": manifest["environment"], "shards": missing})
    return there, done


def _add_drift(place: DatasetPlace, there: dict[str, Any], drift: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with one more drift, which is written."""
    there = {**there, "drift": [*there.get("drift", []), drift]}
    place.write_manifest(there)
    return there


def _shards(manifest: dict[str, Any], part: Part | None) -> range:
    num = manifest["plan"]["shards"]
    return part.shards(num) if part else range(num)


def _compare(there: dict[str, Any], now: dict[str, Any], folder: Place) -> None:
    """Raise unless the folder was begun with the same model, options and plan."""
    model = {"id": "`model`", "weights": "the model's weights"}
    changes = _named(there["model"], now["model"], lambda name: model.get(name, f"the model's {name}"))
    options = {name: value for name, value in UNRECORDED.items() if name in now["options"]} | there["options"]
    changes += _named(options, now["options"], _option)
    if changes:
        raise DiffuMaskError(
            f"{folder} was begun with other options: {', '.join(changes)}; give the old ones to finish it, or use "
            "another folder"
        )
    if there["plan"] != now["plan"] or there["classes"] != now["classes"]:
        raise DiffuMaskError(
            f"{folder} was begun with other prompts: the class list, `sub_classes`, the scenes or the tokenizer "
            "changed; bring the old ones back to finish it, or use another folder"
        )


def _option(name: str) -> str:
    """Return what a sentence calls an option; the hash of a LoRA file is none that can be given."""
    file = name.removeprefix("lora_sha256.")
    return f"`{name}`" if file == name else f"the SHA-256 of the LoRA {file}"


def _named(old: dict[str, Any], new: dict[str, Any], title: Callable[[str], str] = str) -> list[str]:
    return [f"{title(name)} {change}" for name, change in differences(old, new)]
