"""dataset/shard_writer.py: the same bytes as without a thread, a bound on what waits, no failure lost."""

import threading
import time

import pytest
from samples import contents, draw, requests
from test_run import begin, finish

from diffumask_fast.dataset import writer
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.shard_writer import ShardWriter
from diffumask_fast.errors import DiffuMaskError


def rows_of(run, index):
    return [make_row(draw(request)) for request in run.requests_of(index)]


def write(run, before=lambda: None):
    with ShardWriter(run) as shards:
        for index in run.missing_shards():
            before()
            shards.check()
            shards.add(index, rows_of(run, index))
    return shards


def test_the_bytes_are_those_of_a_run_without_a_thread(tmp_path):
    with begin(tmp_path / "a") as run:
        assert write(run).waited > 0
    assert contents(tmp_path / "a") == finish(tmp_path / "b")


def test_a_slow_disk_holds_up_the_drawing(tmp_path, monkeypatch):
    gate, drawn = threading.Event(), []
    with begin(tmp_path / "a", shard_size=2) as run:
        write_rows = run.write_rows
        monkeypatch.setattr(run, "write_rows", lambda *given: gate.wait() and write_rows(*given))
        written = threading.Thread(target=write, args=(run, lambda: drawn.append(1)))
        written.start()
        written.join(0.5)
        assert written.is_alive() and len(run.missing_shards()) == 4
        assert len(drawn) == 2  # one shard at the disk, one that waits for it
        gate.set()
        written.join()
        assert run.missing_shards() == []


def test_a_failing_write_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with begin(tmp_path) as run:
        monkeypatch.setattr(writer.os, "fsync", full)
        with pytest.raises(DiffuMaskError, match="no space left"):
            write(run)
    assert list(contents(tmp_path)) == ["dataset.json"]


def test_a_failed_write_is_told_before_the_next_shard(tmp_path, monkeypatch):
    with begin(tmp_path) as run:
        monkeypatch.setattr(writer.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(DiffuMaskError, match="no space left"), ShardWriter(run) as shards:
            shards.check()
            shards.add(0, rows_of(run, 0))
            while not shards._written.done():
                time.sleep(0.01)
            shards.check()
            pytest.fail("the failure was not told")


def test_the_last_write_is_waited_for_and_its_failure_told(tmp_path, monkeypatch):
    with begin(tmp_path, plan=requests(2)) as run:
        monkeypatch.setattr(writer.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
        with pytest.raises(DiffuMaskError, match="choose a folder"):
            write(run)


def test_an_interruption_drops_what_is_not_being_written(tmp_path):
    with begin(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt), ShardWriter(run) as shards:
            shards.add(0, rows_of(run, 0))
            raise KeyboardInterrupt
        assert len(run.missing_shards()) in (2, 3)
    assert contents(tmp_path).keys() <= {"dataset.json", "data/shard-00000.parquet"}
    assert finish(tmp_path) == finish(tmp_path.parent / "whole")
