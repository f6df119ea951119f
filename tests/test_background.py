"""dataset/background.py: the same bytes as without threads, a bound on what waits, no failure lost."""

import threading
import time

import pytest
from samples import draw, requests
from test_run import begin, finish, tree

from diffumask_fast.dataset import background, writer
from diffumask_fast.dataset.background import Background
from diffumask_fast.errors import DiffuMaskError


def write(run, ahead=2, change=lambda sample: sample):
    with Background(run, ahead) as beside:
        for index, part in run.missing_shards():
            for request in part:
                beside.add(change(draw(request)))
            beside.end_shard(index)
    return beside


def test_the_bytes_are_those_of_a_run_without_threads(tmp_path):
    with begin(tmp_path / "a") as run:
        assert write(run).waited > 0
    assert tree(tmp_path / "a") == finish(tmp_path / "b")


def test_no_more_than_so_many_samples_wait(tmp_path, monkeypatch):
    gate, encode, begun = threading.Event(), background.make_row, []

    def slow(sample):
        begun.append(sample)
        gate.wait()
        return encode(sample)

    monkeypatch.setattr(background, "make_row", slow)
    with begin(tmp_path) as run, Background(run, 2) as beside:
        samples = [draw(request) for request in run.missing_shards()[0][1]]
        added = threading.Thread(target=lambda: [beside.add(sample) for sample in samples])
        added.start()
        added.join(0.3)
        assert added.is_alive() and len(beside._rows) == 2
        gate.set()
        added.join()
        beside.end_shard(0)
    assert run.accepted_flags() == [sample.accepted for sample in samples]


def test_a_slow_disk_holds_up_the_drawing(tmp_path, monkeypatch):
    gate, drawn = threading.Event(), []
    with begin(tmp_path / "a", shard_size=2) as run:
        write_rows = run.write_rows
        monkeypatch.setattr(run, "write_rows", lambda *given: gate.wait() and write_rows(*given))
        written = threading.Thread(target=write, args=(run, 2, lambda sample: drawn.append(1) or sample))
        written.start()
        written.join(0.5)
        assert written.is_alive() and len(run.missing_shards()) == 4
        assert len(drawn) == 4  # one shard at the disk, one that waits for it
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
    assert list(tree(tmp_path)) == ["dataset.json"]


def test_a_failed_write_is_told_with_the_next_sample(tmp_path, monkeypatch):
    with begin(tmp_path) as run:
        write_rows = run.write_rows

        def fails_first(index, rows):
            if index == 0:
                raise DiffuMaskError("no space left")
            return write_rows(index, rows)

        monkeypatch.setattr(run, "write_rows", fails_first)
        (_, first), (_, second), _ = run.missing_shards()
        with pytest.raises(DiffuMaskError, match="no space left"), Background(run, 2) as beside:
            for request in first:
                beside.add(draw(request))
            beside.end_shard(0)
            while not beside._written.done():
                time.sleep(0.01)
            beside.add(draw(second[0]))
            pytest.fail("the failure was not told")


def test_the_last_write_is_waited_for_and_its_failure_told(tmp_path, monkeypatch):
    with begin(tmp_path, plan=requests(2)) as run:
        monkeypatch.setattr(writer.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
        with pytest.raises(DiffuMaskError, match="choose a folder"):
            write(run)


def test_a_sample_that_cannot_be_encoded_is_told(tmp_path):
    def spoil(sample):
        sample.image = sample.image.astype(float)
        return sample

    with begin(tmp_path) as run, pytest.raises(DiffuMaskError, match="must be uint8"):
        write(run, change=spoil)


def test_an_interruption_drops_the_unfinished_shard(tmp_path):
    with begin(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt), Background(run, 2) as beside:
            for request in run.missing_shards()[0][1]:
                beside.add(draw(request))
            beside.end_shard(0)
            beside.add(draw(run.missing_shards()[-1][1][0]))
            raise KeyboardInterrupt
        assert len(run.missing_shards()) in (2, 3)
    assert tree(tmp_path).keys() <= {"dataset.json", "data/shard-00000.parquet"}
    assert finish(tmp_path) == finish(tmp_path.parent / "whole")
