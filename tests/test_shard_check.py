"""dataset/shard_check.py: a shard is done when it decodes and was written for its place in this run."""

import logging
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from samples import contents, draw, requests
from test_run import OPTIONS, begin, finish

from diffumask_fast.dataset.reader import open_shard, read_manifest, read_rows, shard_paths
from diffumask_fast.dataset.schema import SCHEMA
from diffumask_fast.dataset.shard_check import digest_plan, finished_shards, names_digest
from diffumask_fast.dataset.writer import MARK, shard_path, write_shard
from diffumask_fast.errors import DiffuMaskError


@pytest.fixture
def run(tmp_path):
    finish(tmp_path / "run")
    return tmp_path / "run"


def other_run(folder, **options):
    finish(folder, options={**OPTIONS, **options}, plan=requests(7, seed=options.get("seed", 0)))
    return folder


def swap(run, tmp_path):
    first, second = (shard_path(run, index) for index in (0, 1))
    both = first.read_bytes(), second.read_bytes()
    first.write_bytes(both[1])
    second.write_bytes(both[0])


def double(run, tmp_path):
    shutil.copy(shard_path(run, 0), shard_path(run, 1))


def of_another_seed(run, tmp_path):
    shutil.copy(shard_path(other_run(tmp_path / "b", seed=2), 1), shard_path(run, 1))


def of_other_options(run, tmp_path):  # the same keys and seeds
    shutil.copy(shard_path(other_run(tmp_path / "b", guidance_scale=7.5), 1), shard_path(run, 1))


def without_a_row(run, tmp_path):  # pyarrow keeps the mark
    pq.write_table(pq.read_table(shard_path(run, 1))[:2], shard_path(run, 1))


def with_a_row_twice(run, tmp_path):
    pq.write_table(pq.read_table(shard_path(run, 1)).take([0, 0, 1]), shard_path(run, 1))


def unmarked_of_another_seed(run, tmp_path):  # as older versions wrote them
    write_shard(run, 1, [row.values for row in read_rows(other_run(tmp_path / "b", seed=2), accepted_only=False)][3:6])


def beyond_the_plan(run, tmp_path):
    shutil.copy(shard_path(run, 1), shard_path(run, 99))


def under_a_name_of_its_own(run, tmp_path):
    shutil.copy(shard_path(run, 1), run / "data" / "shard-00001 (copy).parquet")


FOREIGN = [
    swap, double, of_another_seed, of_other_options, without_a_row, with_a_row_twice, unmarked_of_another_seed,
    beyond_the_plan, under_a_name_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("change", FOREIGN)
def test_what_is_not_of_this_run_is_named_and_stays(run, tmp_path, change):
    change(run, tmp_path)
    before = contents(run)
    for use in (lambda: begin(run), lambda: finished_shards(run, read_manifest(run))):
        with pytest.raises(DiffuMaskError, match="data.*move it away|the files as they were written") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert contents(run) == before


def cut_off(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def without_magic(data):
    return data[:-4]


def half_full(data):
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize("damage", [cut_off, empty, without_magic, half_full])
def test_a_damaged_shard_is_drawn_again_and_named(run, caplog, damage):
    files = contents(run)
    shard_path(run, 1).write_bytes(damage(shard_path(run, 1).read_bytes()))
    with pytest.raises(DiffuMaskError, match="shard-00001.parquet"):
        finished_shards(run, read_manifest(run))
    with caplog.at_level(logging.WARNING, "diffumask_fast"):
        assert finish(run) == files
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "shard-00001.parquet is damaged: it is made anew" in caplog.text


def test_a_flipped_byte_of_any_page_is_noticed(run):
    path, files = shard_path(run, 1), contents(run)
    whole = path.read_bytes()
    with open_shard(path) as file:
        column = [file.metadata.row_group(0).column(index) for index in range(file.metadata.num_columns)]
    pages = [one.data_page_offset + one.total_compressed_size - 3 for one in column]
    assert len(pages) > 13
    for place in pages:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with begin(run) as again:
            assert again.missing_shards() == [1]
        path.write_bytes(whole)
    assert contents(run) == files


@pytest.mark.parametrize("data", [b"my notes", b"x", np.random.default_rng(0).bytes(5000)])
def test_a_file_that_was_never_a_shard_is_not_replaced(run, data):
    shard_path(run, 1).write_bytes(data)
    with pytest.raises(DiffuMaskError, match="shard-00001.parquet is no shard, and not replaced"):
        begin(run)
    assert shard_path(run, 1).read_bytes() == data


def test_a_link_or_a_pipe_at_a_shards_name_is_not_followed(run, tmp_path):
    shard_path(run, 1).rename(tmp_path / "elsewhere.parquet")
    shard_path(run, 1).symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(DiffuMaskError, match="shard-00001.parquet is a link"):
        begin(run)
    shard_path(run, 1).unlink()
    os.mkfifo(shard_path(run, 1))
    for use in (lambda: begin(run), lambda: finished_shards(run, read_manifest(run))):
        with pytest.raises(DiffuMaskError, match="shard-00001.parquet is no file"):
            use()


def test_shards_of_older_versions_bear_no_mark_and_count(run):
    for index, path in enumerate(shard_paths(run)):
        rows = [row.values for row in read_rows(run, accepted_only=False)][3 * index : 3 * index + 3]
        write_shard(run, index, rows)
        assert MARK not in pq.read_schema(path).metadata and pq.read_schema(path).metadata == SCHEMA.metadata
    with begin(run) as again:
        assert again.missing_shards() == []
    assert len(finished_shards(run, read_manifest(run))) == 3


def test_a_missing_shard_is_named(run):
    shard_path(run, 2).unlink()
    with pytest.raises(DiffuMaskError, match="not finished: shard-00002.parquet is missing, one of 1"):
        finished_shards(run, read_manifest(run))


def test_a_plan_has_each_key_once():
    with pytest.raises(DiffuMaskError, match="request 2 of the run has the key of an earlier one: give each key once"):
        digest_plan([*requests(2), *requests(1)], 3)
    assert digest_plan(requests(2), 3).sha256 != digest_plan(requests(3), 3).sha256


@pytest.mark.parametrize("num", [1, 3, 6, 7])
def test_the_digest_of_a_plan_knows_each_shard(num):
    names = [(request.key, request.seed) for request in requests(num)]
    digest = digest_plan(iter(requests(num)), 3)
    assert digest.shards == [names_digest(names[start : start + 3]) for start in range(0, num, 3)]
    assert digest.sha256 == digest_plan(requests(num), 64).sha256
    assert names_digest(names) != names_digest([(key, seed + 1) for key, seed in names])


def test_of_a_large_run_pages_are_not_all_read(run, monkeypatch):
    from diffumask_fast.dataset import shard_check

    read = []
    real = shard_check.read_content
    monkeypatch.setattr(shard_check, "READ_WHOLE", 1)
    monkeypatch.setattr(
        shard_check, "read_content", lambda path, whole=False: read.append(whole) or real(path, whole=whole)
    )
    begin(run).close()
    assert read == [True, False, False]


def test_rows_of_a_shard_can_be_handed_over_one_by_one(tmp_path):
    plan = requests(150)
    (tmp_path / "data").mkdir()
    from diffumask_fast.dataset.schema import make_row

    path = write_shard(tmp_path, 0, (make_row(draw(request)) for request in plan))
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [row.key for row in read_rows(tmp_path, accepted_only=False)] == [request.key for request in plan]
