"""The manifest of an engine's folder, and the checks that the folder and the machine still fit it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diffumask_fast import __version__
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.limits import Limits
from diffumask_fast.models.hashing import combined_hash, file_hashes

FORMAT = 2
MANIFEST = "engine.json"
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Part:
    """One component of a diffusers pipeline as a graph.

    Args:
        graph: file of the graph.
        config: file of the component's configuration.
        library: "diffusers" or "transformers".
        kind: class of the component.
        dtype: "fp32", "fp16" or "bf16".
        outputs: of the graph, in order.
    """

    graph: str
    config: str
    library: str
    kind: str
    dtype: str
    outputs: list[str]


@dataclass(frozen=True)
class Manifest:
    """What `engine.json` holds.

    Args:
        engine: "onnx", "tensorrt" or "tensorrt-rtx".
        dtype: "fp32", "fp16" or "bf16".
        opset: of the graphs.
        limits: of the engine.
        parts: component of the pipeline -> Part.
        files: name -> SHA-256, of all files beside the manifest.
        model: name of the model that was exported.
        sources: path in the model's folder -> SHA-256.
        versions: library -> version that wrote the engine.
        checked: part -> output -> largest error against torch in fp32, relative to the largest value; a part that was
            not run has a reason in place of the figures.
        target: compute capability of the GPU, where it was built for one.
        refittable: whether it takes the weights of other models.
    """

    engine: str
    dtype: str
    opset: int
    limits: Limits
    parts: dict[str, Part]
    files: dict[str, str]
    model: str
    sources: dict[str, str]
    versions: dict[str, str]
    checked: dict[str, Any]
    target: str = ""
    refittable: bool = False
    format: int = FORMAT

    @property
    def sha256(self) -> str:
        """What decides what the engine draws: graphs, weights, limits and types."""
        deciding = {**self.as_json(), "versions": None, "checked": None, "model": None}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    @property
    def passed(self) -> bool:
        """Whether each part was run and compared."""
        return not any(isinstance(found, str) for found in self.checked.values())

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as JSON types."""
        return {**asdict(self), "limits": self.limits.as_json()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that an engine depends on, those that are there."""
    found = {"diffumask_fast": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hash_files(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files of an engine, the manifest and folders left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest beside the files that it lists, and flush them all."""
    (folder / MANIFEST).write_text(json.dumps(manifest.as_json(), indent=1), "utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read an engine's folder, and check that it is whole and can be run with what is installed.

    Raises:
        DiffuMaskError: no engine, another format or library version, a file that is missing, cut off or altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DiffuMaskError(f"{folder} is no exported engine: give the folder that `diffumask-fast export` wrote.")
    try:
        data = json.loads(path.read_text("utf-8"))
        version = data["format"]
        if version == FORMAT:
            parts = {name: Part(**part) for name, part in data.pop("parts").items()}
            manifest = Manifest(**{**data, "limits": Limits.from_json(data["limits"]), "parts": parts})
            named = {name for part in parts.values() for name in (part.graph, part.config)}
            if "unet" not in parts or not named <= dict(manifest.files).keys():
                raise KeyError("unet" if "unet" not in parts else min(named - manifest.files.keys()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffuMaskError(f"{path} is damaged ({error!r:.100}): export the model again.") from error
    if version != FORMAT:
        raise DiffuMaskError(f"{folder} has format {version}, and this program reads {FORMAT}: export the model again.")
    wrote = manifest.versions.get("diffumask_fast", "another version")
    if wrote != __version__:
        raise DiffuMaskError(
            f"{folder} was written by diffumask-fast {wrote} and this is {__version__}: export the model again."
        )
    found = hash_files(folder)
    for name, digest in manifest.files.items():
        if found.get(name) != digest:
            what = "is missing" if name not in found else "is cut off or altered"
            raise DiffuMaskError(f"{folder / name} {what}: export the model again.")
    return manifest


def check_runtime(manifest: Manifest, version: str, folder: Path) -> None:
    """Refuse an ONNX Runtime that is older than the one that the engine was checked with.

    Raises:
        DiffuMaskError: naming both versions.
    """
    wrote = manifest.versions.get("onnxruntime", "0")
    if _numbers(version) < _numbers(wrote):
        raise DiffuMaskError(
            f"{folder} was checked with onnxruntime {wrote} and {version} is older: update onnxruntime, or export the "
            "model again here."
        )


def check_build(manifest: Manifest, folder: Path, version: str, capability: str | None) -> None:
    """Refuse a TensorRT engine that another version of the library built, or for another GPU than the one here.

    Args:
        manifest: of the engine.
        folder: the engine's, for the message.
        version: of the library that is installed.
        capability: of the GPU, None where there is none.

    Raises:
        DiffuMaskError: naming what differs.
    """
    wrote = manifest.versions.get(manifest.engine, "another version")
    if wrote != version:
        raise DiffuMaskError(
            f"{folder} was built by {manifest.engine} {wrote} and {version} is installed: export the model again here."
        )
    if capability != manifest.target:
        here = f"the one here has {capability}" if capability else "there is none here"
        raise DiffuMaskError(
            f"{folder} was built for a GPU of compute capability {manifest.target} and {here}: export the model again "
            "for the GPU that runs it, or use `engine=torch`."
        )


def check_sources(manifest: Manifest, model: Path, folder: Path) -> str:
    """Check that a model's folder has the weights that were exported, or none.

    Args:
        manifest: of the engine.
        model: the model's folder.
        folder: the engine's, for the message.

    Returns:
        the hash of the model's files, those that the engine holds and the folder lacks included.

    Raises:
        DiffuMaskError: naming a file that is not the one that was exported.
    """
    found = file_hashes(model)
    for name, digest in found.items():
        if name.split("/")[0] in manifest.parts and manifest.sources.get(name) != digest:
            raise DiffuMaskError(
                f"{folder} was exported from other weights than {model} has now ({name} differs): export the model "
                "again, or give the model that was exported."
            )
    held = {name: digest for name, digest in manifest.sources.items() if name.split("/")[0] in manifest.parts}
    return combined_hash(held | found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdecimal())
