"""Engines exported once for all tests; treat them as read-only."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffumask_fast.export.options import ShapeOptions

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))


def read_back(folder, manifest):
    """Return the manifest as it stands in the folder, which must be what the export returned."""
    found = json.loads((folder / "engine.json").read_text())
    assert found == json.loads(json.dumps(manifest))
    return found


def exported(folder, out, **options):
    """Export a model folder to ONNX, and return the folder of the engine."""
    from diffumask_fast.export.onnx_export import export_onnx

    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    read_back(out, export_onnx(folder, out, **options).as_json())
    return out


@pytest.fixture(scope="session")
def mini_engine(tmp_path_factory):
    """mini by the command line: dynamic rows and size, propagation at three levels."""
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("engine") / "mini"
    command = [PROGRAM, "export", "mini", str(out), "--to", "onnx", "--max-batch", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    printed = json.loads(done.stdout)
    assert printed.pop("folder") == str(out) and len(printed.pop("sha256")) == 64
    read_back(out, printed)
    return out


@pytest.fixture(scope="session")
def sdxl_folder(sdxl_parts, tiny_folder, tmp_path_factory):
    """A diffusers folder with the parts of tiny_sdxl."""
    from conftest import new_pipe

    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    new_pipe(StableDiffusionXLPipeline, sdxl_parts, add_watermarker=False).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
        shutil.copytree(tiny_folder / "tokenizer", folder / name)
    return folder


@pytest.fixture(scope="session")
def sdxl_engine(sdxl_folder, tmp_path_factory):
    """A tiny SDXL: two text encoders, added conditions, dynamic rows and size."""
    return exported(sdxl_folder, tmp_path_factory.mktemp("engine") / "sdxl", shapes=ShapeOptions(max_batch=4))


@pytest.fixture(scope="session")
def static_engine(tiny_folder, tmp_path_factory):
    """A tiny SD of exactly 2 images of 64x96, two phrases, no propagation, weights in files of their own."""
    shapes = ShapeOptions(max_batch=2, min_size=(64, 96), static=True, max_phrases=2, propagate=False)
    return exported(tiny_folder, tmp_path_factory.mktemp("engine") / "static", shapes=shapes, external_bytes=0)
