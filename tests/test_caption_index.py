"""generation/caption_index.py: vectors are made once, and a torn or damaged index is made anew."""

import numpy as np
import pytest

from diffumask_fast.generation import caption_index
from diffumask_fast.generation.caption_index import index_path, read_or_make

CAPTIONS = [(f"a dog {i}", "dog" if i % 3 else "cat\ndog") for i in range(300)]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(caption_index, "CHUNK", 128)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Embed:
    """Count what is embedded; the vector of a text is a function of it."""

    def __init__(self):
        self.count = 0

    def __call__(self, texts):
        self.count += len(texts)
        return np.array([[len(text), int(text.split()[-1]), 1.5] for text in texts], np.float16)


def taken(path, embed, captions=CAPTIONS):
    chunks = list(read_or_make(path, lambda: iter(captions), embed))
    assert max((len(chunk.captions) for chunk in chunks), default=0) <= 128
    rows = [row for chunk in chunks for row in zip(chunk.captions, chunk.classes, strict=True)]
    vectors = np.concatenate([chunk.vectors for chunk in chunks]) if chunks else None
    return rows, vectors


def check(path, embed):
    rows, vectors = taken(path, embed)
    assert rows == CAPTIONS and np.array_equal(vectors, Embed()([caption for caption, _ in CAPTIONS]))
    assert vectors.dtype == np.float16


def test_an_index_is_made_once(tmp_path):
    path, embed = index_path("file", 1), Embed()
    for _ in range(2):
        check(path, embed)
    assert embed.count == 300 and [one.name for one in path.parent.iterdir()] == [path.name]
    assert path.is_relative_to(tmp_path / "cache") and index_path("file", 2) != path == index_path("file", 1)
    check(None, embed)
    assert embed.count == 600


def test_it_may_be_read_in_other_chunks(monkeypatch):
    path, embed = index_path("file"), Embed()
    check(path, embed)
    monkeypatch.setattr(caption_index, "CHUNK", 50)
    check(path, embed)
    assert embed.count == 300


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "other"])
def test_a_harmed_index_is_made_anew(harm, caplog):
    path, embed = index_path("file"), Embed()
    check(path, embed)
    data = path.read_bytes()
    middle = data.index(Embed()(["a dog 9"]).tobytes())
    path.write_bytes({
        "cut": data[:-300], "changed": data[:middle] + b"\x01" + data[middle + 1 :], "empty": b"", "other": b"x" * 5000,
    }[harm])  # fmt: skip
    check(path, embed)
    assert embed.count == 600 and path.read_bytes() == data and "is damaged" in caplog.text


def test_what_is_interrupted_leaves_nothing():
    path = index_path("file")
    chunks = read_or_make(path, lambda: iter(CAPTIONS), Embed())
    next(chunks)
    chunks.close()
    assert list(path.parent.iterdir()) == []

    def broken():
        yield from CAPTIONS[:200]
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(read_or_make(path, broken, Embed()))
    assert list(path.parent.iterdir()) == []


def test_without_a_cache_it_goes_on(tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    embed = Embed()
    for _ in range(2):
        check(index_path("file"), embed)
    assert embed.count == 600 and "cannot be kept" in caplog.text


def test_no_caption_is_no_index():
    path = index_path("file")
    assert taken(path, Embed(), []) == ([], None) and not path.exists()


def test_old_indices_make_room_for_new_ones(monkeypatch):
    paths = [index_path(number) for number in range(3)]
    for path in paths[:2]:
        check(path, Embed())
    monkeypatch.setattr(caption_index, "MOST_BYTES", 1.5 * paths[0].stat().st_size)
    check(paths[0], Embed())  # used again
    check(paths[2], Embed())
    assert [path.exists() for path in paths] == [False, False, True]
