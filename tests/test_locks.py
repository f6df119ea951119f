"""dataset/locks.py: who holds a lock keeps others out, until it ends; a file made for a lock goes with it."""

import fcntl
import os

import pytest

from diffumask_fast.dataset.locks import Lock, Taken, is_taken


def test_one_or_several_that_share(tmp_path):
    with Lock(tmp_path), pytest.raises(Taken):
        Lock(tmp_path, shared=True)
    with Lock(tmp_path, shared=True) as lock, Lock(tmp_path, shared=True):
        assert lock.works and is_taken(tmp_path) and not is_taken(tmp_path, shared=True)
        with pytest.raises(Taken):
            Lock(tmp_path)
    assert not is_taken(tmp_path)


def test_a_file_made_for_a_lock_goes_with_it(tmp_path):
    lock = Lock(tmp_path / "lock", make=True)
    with pytest.raises(Taken):
        Lock(tmp_path / "lock", make=True)
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_a_lock_on_a_file_that_its_holder_removes_meanwhile_is_none(tmp_path, monkeypatch):
    """The file is opened, then removed by the one that ends, then locked: the lock would be on no file."""
    real, path = fcntl.flock, tmp_path / "lock"

    def late(descriptor, kind):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = Lock(path, make=True)
    assert path.exists() and is_taken(path)
    lock.release()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Lock(tmp_path / "link", make=True)
    assert os.listdir(tmp_path) == ["link"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(9, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock(tmp_path) as lock:
        assert not lock.works and not is_taken(tmp_path)
