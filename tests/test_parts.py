"""dataset/parts.py: several processes write parts of one run into one folder, and nobody can tell afterwards."""

import errno
import fcntl
import os

import pytest
from samples import contents, draw, requests
from test_run import begin, change, finish

from diffumask_fast.dataset.parts import Part, part_of
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import checked

A, B = Part(0, 2), Part(1, 2)


def refuse(number):
    raise OSError(number, os.strerror(number))


def write(run, shards=99):
    for index in run.missing_shards()[:shards]:
        run.write(index, [draw(request) for request in run.requests_of(index)])


def test_the_shards_of_parts_are_all_shards_once():
    for count in (1, 2, 3, 9):
        shards = [index for part in range(count) for index in Part(part, count).shards(7)]
        assert sorted(shards) == list(range(7))
    assert list(Part(1, 3).shards(7)) == [1, 4] and list(Part(8, 9).shards(7)) == []


def test_a_part_is_read_as_it_is_written():
    assert checked("part", "1/4", part_of()) == checked("part", Part(1, 4), part_of()) == Part(1, 4)
    assert str(Part(1, 4)) == "1/4"


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0", "0/0", "1/2/3", "", "1.0/2", Part(4, 4), 3, True])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(
        DiffuMaskError, match="`part` must be i/n with i from 0 to n - 1: the first of four parts is 0/4"
    ):
        checked("part", text, part_of())


def test_two_parts_at_once_give_the_bytes_of_one_process(tmp_path):
    whole, out = finish(tmp_path / "whole"), tmp_path / "out"
    with begin(out, part=A) as first:
        with begin(out, part=B) as second:
            assert (first.missing_shards(), second.missing_shards()) == ([0, 2], [1])
            write(second)
            assert second.num_missing() == 2 and second.show(None, 10**6) == 2
            assert [row.key for row in second.rows(accepted_only=False)] == [one.key for one in requests(7)[3:6]]
        assert sorted(path.name for path in out.iterdir()) == [".0-of-2.lock", "data", "dataset.json"]
        write(first)
        assert first.show(None, 10**6) == 0
    files = contents(out)
    assert files.pop("preview.png")[:4] == b"\x89PNG" and files.pop("README.md")[:4] == b"---\n" and files == whole
    with begin(out) as run:
        assert run.missing_shards() == []


def test_more_parts_than_shards(tmp_path):
    with begin(tmp_path, part=Part(5, 6)) as run:
        assert run.missing_shards() == [] and run.accepted_flags() == [] and run.num_missing() == 3


def test_a_part_writes_its_own_shards_alone(tmp_path):
    with begin(tmp_path, part=A) as run, pytest.raises(DiffuMaskError, match="shard 1 is none of part 0/2"):
        run.write(1, [draw(request) for request in run.requests_of(1)])


@pytest.mark.parametrize(
    "first, second, words",
    [
        (A, A, "another process draws part 0/2 in .*: wait for it to end"),
        (A, None, "parts of a run are being drawn in .*: wait for them to end, or draw one with `part`"),
        (None, A, "another run is writing in .*: wait for it to end"),
        (A, Part(1, 3), "part 0/2 is being drawn in .*: draw parts of the same number"),
    ],
)
def test_who_would_write_the_same_shards_is_refused(tmp_path, first, second, words):
    with begin(tmp_path, part=first) as run:
        write(run, 1)
        before = contents(tmp_path)
        with pytest.raises(DiffuMaskError, match=words) as caught:
            begin(tmp_path, part=second)
        assert "\n" not in str(caught.value) and contents(tmp_path) == before
        write(run)
    begin(tmp_path, part=second).close()
    finish(tmp_path)
    assert contents(tmp_path) == finish(tmp_path.with_name("whole"))


def test_parts_of_other_options_are_refused_before_the_first_shard(tmp_path):
    with begin(tmp_path, part=A) as run:
        before = contents(tmp_path)
        with pytest.raises(DiffuMaskError, match="`seed` was 0 and is 1 now"):
            begin(tmp_path, part=B, **change(seed=1))
        assert contents(tmp_path) == before
        write(run)
    with pytest.raises(DiffuMaskError, match="`seed` was 0 and is 1 now"):
        begin(tmp_path, part=B, **change(seed=1))


def test_parts_that_have_drawn_nothing_bind_nobody(tmp_path):
    begin(tmp_path, part=A, **change(seed=1)).close()
    for part in (B, A):
        finish(tmp_path, part=part)
    assert contents(tmp_path) == finish(tmp_path.with_name("whole"))


def leave(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"half")


def test_a_part_removes_what_killed_ones_left_and_nothing_of_living_ones(tmp_path):
    """Part 0 of 3 lives, part 1 was killed, part 2 was killed and is drawn again."""
    with begin(tmp_path, part=Part(0, 3)) as run:
        living = (".dataset.json.0-of-3.tmp", "data/.shard-00000.parquet.0-of-3.tmp")
        killed = (".1-of-3.lock", "data/.shard-00001.parquet.1-of-3.tmp", ".2-of-3.lock", ".preview.png.2-of-3.tmp")
        whole = (".dataset.json.tmp", "data/.shard-00002.parquet.tmp")
        others = (".mine-of-me.lock", "data/.shard-00001.parquet.mine.tmp")
        leave(tmp_path, *living, *killed, *whole, *others)
        finish(tmp_path, part=Part(2, 3))
        left = {name for name, data in contents(tmp_path).items() if data == b"half"}
        assert left == {*living, *others} and (tmp_path / ".0-of-3.lock").exists()
        write(run)
    finish(tmp_path)
    assert {name for name, data in contents(tmp_path).items() if data == b"half"} == set(others)


def test_the_last_part_removes_what_a_killed_one_left(tmp_path):
    finish(tmp_path, part=A)
    with begin(tmp_path, part=B) as run:
        leave(tmp_path, ".0-of-2.lock", "data/.shard-00000.parquet.0-of-2.tmp")
        write(run)
        run.show(None, 10**6)
    assert not [name for name in contents(tmp_path) if "of-2" in name]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    """As before: each file is whole; nobody's temporary file is taken for a dead one's, and a manifest binds."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(errno.EBADF))
    with begin(tmp_path, part=A) as first:
        leave(tmp_path, "data/.shard-00000.parquet.0-of-2.tmp")
        with begin(tmp_path, part=B) as second:
            assert (tmp_path / "data" / ".shard-00000.parquet.0-of-2.tmp").exists()
            with pytest.raises(DiffuMaskError, match="`seed` was 0"):
                begin(tmp_path, part=Part(1, 3), **change(seed=1))
            write(first)
            write(second)
            second.show(None, 10**6)
    files = contents(tmp_path)
    assert files.pop("preview.png") and files.pop("README.md") and files == finish(tmp_path.with_name("whole"))


def test_drift_of_a_part_is_recorded_with_its_own_shards(tmp_path):
    other = {"torch": "2.14.0", "threads": 2}
    finish(tmp_path, part=A)
    with begin(tmp_path, part=B, environment=other, allow_drift=True) as run:
        assert run.manifest["environment"] != other
        drift = {"environment": other, "shards": [1]}
        with begin(tmp_path, part=A, allow_drift=True) as again:
            assert again.manifest["drift"] == [drift]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/nothing"):
        with pytest.raises(DiffuMaskError, match="no folder|cannot write"):
            begin(place, part=A)


def test_a_folder_that_vanishes(tmp_path):
    out = tmp_path / "out"
    with begin(out, part=A) as run:
        os.rename(out, tmp_path / "elsewhere")
        with pytest.raises(DiffuMaskError, match="cannot write in .*No such file"):
            write(run)


def test_a_full_disk_stops_a_part_and_leaves_the_others_work(tmp_path, monkeypatch):
    with begin(tmp_path, part=A) as run:
        write(run, 1)
        before = contents(tmp_path)
        with (
            monkeypatch.context() as patch,
            pytest.raises(DiffuMaskError, match="no space left .*run the same"),
        ):
            patch.setattr(os, "fsync", lambda descriptor: refuse(errno.ENOSPC))
            write(run)
        assert contents(tmp_path) == before
    for part in (B, A):
        finish(tmp_path, part=part)
    assert contents(tmp_path) == finish(tmp_path.with_name("whole"))


def test_a_part_looks_at_its_own_shards_alone(tmp_path, caplog):
    finish(tmp_path, part=A)
    shard = tmp_path / "data" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    finish(tmp_path, part=B)
    assert not caplog.text
    finish(tmp_path, part=A)
    assert "shard-00000.parquet is damaged" in caplog.text
    assert contents(tmp_path) == finish(tmp_path.with_name("whole"))
