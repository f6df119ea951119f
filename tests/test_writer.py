"""dataset/writer.py: files are whole or absent, and equal rows are equal bytes."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from samples import draw, requests

from diffumask_fast.dataset import writer
from diffumask_fast.dataset.reader import read_shard
from diffumask_fast.dataset.schema import SCHEMA, make_row
from diffumask_fast.dataset.writer import make_folder, shard_path, write_file, write_shard
from diffumask_fast.errors import DiffuMaskError

ROWS = [make_row(draw(request)) for request in requests(5)]


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "out" / "data")
    return tmp_path / "out"


def test_a_shard_is_a_parquet_file_of_the_schema(folder):
    path = write_shard(folder, 42, ROWS)
    assert path == folder / "data" / "shard-00042.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA) and table.schema.metadata == SCHEMA.metadata
    assert table["key"].to_pylist() == [row["key"] for row in ROWS]
    assert os.listdir(folder / "data") == [path.name]


def test_equal_rows_give_equal_bytes(folder):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from samples import draw, requests;"
        "from diffumask_fast.dataset.schema import make_row; from diffumask_fast.dataset.writer import write_shard;"
        "write_shard(sys.argv[1], 1, [make_row(draw(request)) for request in requests(5)])"
    )
    subprocess.run([sys.executable, "-c", code, folder, os.path.dirname(__file__)], check=True)
    write_shard(folder, 0, ROWS)
    assert shard_path(folder, 0).read_bytes() == shard_path(folder, 1).read_bytes()


def test_row_groups_are_bounded_in_bytes_and_a_large_one_has_an_index(folder, monkeypatch):
    path = write_shard(folder, 0, ROWS)
    with pq.ParquetFile(path) as file:
        one = file.metadata
    assert one.num_row_groups == 1 and not one.row_group(0).column(1).has_offset_index
    assert one.row_group(0).column(0).statistics.max == max(row["key"] for row in ROWS)

    sizes = [len(row["image"]["bytes"]) + len(row["mask"]["bytes"]) + len(row["maps"]) for row in ROWS]
    monkeypatch.setattr(writer, "GROUP_BYTES", sizes[0] + 1)  # two rows, for the bound is what a group reaches
    monkeypatch.setattr(writer, "INDEXED_BYTES", sum(sizes[:2]) - 1)
    with pq.ParquetFile(write_shard(folder, 1, iter(ROWS))) as file:
        many, table = file.metadata, file.read()
    assert [many.row_group(group).num_rows for group in range(3)] == [2, 2, 1]
    assert many.row_group(2).column(1).has_offset_index
    assert table.equals(pq.read_table(path)) and [row.key for row in read_shard(shard_path(folder, 1))] == [
        row["key"] for row in ROWS
    ]


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "no space left .*free some and run the same command again"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "cannot write in .*choose a folder"),
        (errno.EACCES, "cannot write in .*choose a folder"),
        (errno.EIO, "cannot write in"),
    ],
)
def test_a_failed_write_leaves_nothing(folder, monkeypatch, number, words):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiffuMaskError, match=words) as caught:
        write_shard(folder, 0, ROWS)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder / "data") == []


def test_a_file_system_that_takes_no_more(folder):
    # a real refusal by the system, half-way through the file
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = folder / "big.bin"
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiffuMaskError, match="cannot write in"):
            write_file(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(folder)) == ["data"]


def test_an_interrupt_leaves_nothing_and_keeps_the_old_file(folder, monkeypatch):
    path = folder / "dataset.json"
    write_file(path, b"old")

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and sorted(os.listdir(folder)) == ["data", "dataset.json"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffuMaskError, match="is no folder"):
        make_folder(tmp_path / name)


def test_a_folder_that_cannot_be_made():
    with pytest.raises(DiffuMaskError, match="/proc/nothing"):
        make_folder(Path("/proc/nothing/data"))


def test_a_link_at_the_temporary_name_is_not_followed(folder, tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (folder / ".dataset.json.tmp").symlink_to(tmp_path / "theirs")
    write_file(folder / "dataset.json", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and (folder / "dataset.json").read_bytes() == b"ours"
