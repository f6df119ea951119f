"""kernels/source.py: a changed kernel is another key."""

import shutil

import pytest

from diffumask_fast.kernels import source_hash
from diffumask_fast.kernels.source import FOLDER


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kernels"


def test_the_same_sources_have_the_same_hash_wherever_they_lie(folder):
    assert source_hash() == source_hash(folder)
    (folder / "notes.txt").write_text("no kernel")
    assert source_hash() == source_hash(folder)


@pytest.mark.parametrize("name", ["attend_triton.py", "winograd.cpp", "native.h", "tuned.json"])
def test_any_change_of_a_source_is_another_hash(folder, name):
    with (folder / name).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    changed = source_hash(folder)
    (folder / name).rename(folder / f"a_{name}" if name != "tuned.json" else folder / "away")
    assert len({source_hash(), changed, source_hash(folder)}) == 3
