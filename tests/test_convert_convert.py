"""convert/convert.py: the same files whatever the number of processes, also after a kill."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from foreign import VOC_CLASSES, converted, dataset, killed_conversion
from killed import kill_at
from samples import contents

from diffumask_fast.convert.convert import convert
from diffumask_fast.convert.import_folder import import_folder
from diffumask_fast.convert.options import FORMATS, ConvertOptions, ImportOptions
from diffumask_fast.dataset.storage import place
from diffumask_fast.errors import DiffuMaskError

PROGRAM = """
import sys
from pathlib import Path
from foreign import VOC_CLASSES, converted
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import ReadOptions
if __name__ == "__main__":
    source, out, to, workers, pixels = sys.argv[1:]
    try:
        converted(Path(source), Path(out), to, val=0.3, workers=int(workers), reading=ReadOptions(int(pixels)))
    except DiffuMaskError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def begin(tmp_path):
    """Give a function that begins a conversion in a program of its own, which starts processes."""

    def start(source, out, to, workers, pixels=10**6):
        (tmp_path / "program.py").write_text(PROGRAM)
        command = [sys.executable, tmp_path / "program.py", source, out, to, str(workers), str(pixels)]
        environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        begun.append(process)
        return process

    begun = []
    yield start
    for process in begun:  # those it started too, whatever has failed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("source") / "a")


@pytest.mark.parametrize("to", FORMATS)
def test_again_it_does_nothing(source, tmp_path, to):
    if to == "reference":
        source, val = dataset(tmp_path / "a", classes=VOC_CLASSES), 0
    else:
        val = 3
    options = ConvertOptions(source, tmp_path / "b", to, val=val / 10, workers=1)
    summary = convert(options)
    rate = summary.pop("images_per_s")
    assert summary == {"folder": str(tmp_path / "b"), "format": to, "images": 11, "train": 11 - val, "val": val}
    assert rate > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}
    assert convert(options) == summary | {"images_per_s": 0.0}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")} == before
    assert not any("000004" in str(path) for path in before)  # the rejected row
    assert not any(path.name.startswith(".") for path in before)


@pytest.mark.parametrize("to", ["coco", "webdataset"])
def test_processes_make_no_difference(source, tmp_path, begin, to):
    process = begin(source, tmp_path / "three", to, 3)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and ("--like coco" in told) == bool(told) == (to == "coco")
    assert contents(converted(source, tmp_path / "one", to, val=0.3)) == contents(tmp_path / "three")


def test_killed_it_ends_with_the_same_bytes(source, tmp_path):
    whole = contents(converted(source, tmp_path / "whole", "coco", val=0.3))
    # before the record, among the images of the first shard, in the second, before a list
    for call in (1, 4, 9, 2):
        kill_at(call, killed_conversion, source, tmp_path / "b")
    assert contents(tmp_path / "b") != whole
    converted(source, tmp_path / "b", "coco", val=0.3)
    assert contents(tmp_path / "b") == whole


@pytest.mark.parametrize("moment", ["starting", "at work"])
def test_a_killed_parent_takes_its_processes_along(tmp_path, begin, moment):
    source, out = dataset(tmp_path / "a", 60), tmp_path / "b"
    process, children = _begun_with_processes(begin, source, out, moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert _within(60, lambda: not any(map(_lives, children)))
    assert len(list(out.glob("JPEGImages/*"))) < 59
    converted(source, out, "voc", val=0.3)
    assert contents(out) == contents(converted(source, tmp_path / "c", "voc", val=0.3))


def test_nobody_else_writes_while_a_process_of_a_killed_parent_lives(tmp_path, begin):
    source, out = dataset(tmp_path / "a", 60), tmp_path / "b"
    process, children = _begun_with_processes(begin, source, out, "at work")
    workers = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(workers) == 2 and _within(60, lambda: all(_has_open(pid, out) for pid in workers))
    for pid in (workers[0], process.pid):
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    with pytest.raises(DiffuMaskError, match="another run is writing"):
        converted(source, out, "voc", val=0.3)
    os.kill(workers[0], signal.SIGCONT)
    assert _within(60, lambda: not any(map(_lives, children)))
    converted(source, out, "voc", val=0.3)


def _begun_with_processes(begin, source, out, moment):
    """Begin a conversion; return it and the processes that it started, before the first file or after it."""
    process = begin(source, out, "voc", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    at_work = moment == "at work"
    assert _within(
        300, lambda: list(out.glob("JPEGImages/*.png")) if at_work else len(children.read_text().split()) > 2
    )
    return process, [int(child) for child in children.read_text().split()]


def _has_open(pid, folder):
    with contextlib.suppress(OSError):
        return any(os.readlink(entry) == str(folder) for entry in Path(f"/proc/{pid}/fd").iterdir())


def _within(seconds, condition):
    """Wait until a condition holds; tell whether it does."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return holds


def _lives(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_dataset_in_an_object_store(source, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(f"{source}/", "/convert/a/", recursive=True)
    out = converted(place("memory://convert/a"), tmp_path / "b", "coco", val=0.3)
    assert contents(out) == contents(converted(source, tmp_path / "c", "coco", val=0.3))
    import_folder(ImportOptions(out, place("memory://convert/d"), "coco", split="val"))
    back = converted(place("memory://convert/d"), tmp_path / "d", "coco")
    assert len(list((back / "images" / "train").iterdir())) == 3
    assert pickle.loads(pickle.dumps(place("s3://a/b"))) == place("s3://a/b")  # as processes are told of it


def test_rejected_rows_when_they_are_asked_for(source, tmp_path):
    out = converted(source, tmp_path / "b", "voc", all=True)
    assert len(list((out / "JPEGImages").iterdir())) == 12


def test_an_error_in_a_process_is_one_sentence_that_names_the_shard(source, tmp_path, begin):
    process = begin(source, tmp_path / "b", "voc", 2, pixels=500)
    sentence = process.communicate(timeout=300)[1].strip()
    assert process.returncode == 1 and re.search(r"shard-0000\d.parquet: .*more than 500 pixels", sentence)
    assert "\n" not in sentence and json.loads((tmp_path / "b" / "convert.json").read_text())["to"] == "voc"


def test_folders_that_are_not_two(source, tmp_path):
    for out in (source, source / "x", source.parent):
        with pytest.raises(DiffuMaskError, match="one folder, or one lies in the other"):
            converted(source, out, "voc")
    with pytest.raises(DiffuMaskError, match="dataset.json is missing"):
        converted(tmp_path / "nothing", tmp_path / "b", "voc")
    with pytest.raises(DiffuMaskError, match="`to` must be one of voc, .*, not 'tfrecord'"):
        converted(source, tmp_path / "b", "tfrecord")
