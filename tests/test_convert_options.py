"""convert/options.py: the two commands as they are called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from foreign import dataset

from diffumask_fast.convert.formats import format_named
from diffumask_fast.convert.options import FORMATS, IMPORTED, ConvertOptions, ImportOptions
from diffumask_fast.errors import DiffuMaskError

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))


def call(*arguments):
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_out_and_in_on_the_command_line(tmp_path):
    source = dataset(tmp_path / "a")
    done = call("convert", source, tmp_path / "b", "--to", "voc", "--val", "0.3", "--workers", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert summary.pop("images_per_s") > 0
    assert summary == {"folder": f"{tmp_path}/b", "format": "voc", "images": 11, "train": 8, "val": 3}
    done = call("import", tmp_path / "b", tmp_path / "c", "--from", "voc", "--split", "val")
    assert done.stdout == f"3 images imported. Look at {tmp_path}/c/preview.png.\n" and done.returncode == 0
    done = call("import", tmp_path / "b", tmp_path / "c", "--from", "voc", "--split", "train")
    assert done.returncode == 1 and "--split was val and is train now" in done.stderr


def test_every_format_has_its_module():
    assert all(format_named(name).NUMBERING in ("own", "compact", "voc", "voc-only") for name in FORMATS)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"to": "tfrecord"}, "`to` must be one of voc, mmseg"),
        ({"val": 1}, "`val` must be a number from 0 to 0.9"),
        ({"image_format": "gif"}, "`image_format` must be one of jpg, png, webp"),
        ({"workers": 0}, "`workers` must be a whole number from 1 to 256"),
        ({"seed": -1}, "`seed` must be a whole number"),
    ],
)
def test_values_that_are_not_allowed(changes, sentence):
    with pytest.raises(DiffuMaskError, match=sentence):
        ConvertOptions(Path("a"), Path("b"), **{"to": "voc"} | changes)


def test_layouts():
    assert all(ImportOptions(Path("a"), Path("b"), name).layout == name for name in IMPORTED)
