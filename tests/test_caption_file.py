"""prompts/caption_file.py: captions of local files, whatever is in these."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.caption_file import CaptionFile, cleaned

TEXTS = ["a dog on the grass", "une  vache\tdans un pré", "草の上の犬", "a cat"]
READ = ["a dog on the grass", "une vache dans un pré", "草の上の犬", "a cat"]


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return CaptionFile(path)


def read(file):
    return list(file), file.skipped


def lines(texts, field="caption"):
    return "".join(json.dumps({"url": "x", field: text}) + "\n" for text in texts)


def test_every_format_gives_the_same_captions(tmp_path):
    plain = "\ufeff" + "\r\n\n".join(TEXTS)
    files = [
        written(tmp_path / "a.txt", plain),
        written(tmp_path / "a.txt.gz", gzip.compress(plain.encode())),
        written(tmp_path / "a.jsonl", lines(TEXTS)),
        written(tmp_path / "a.ndjson", lines(TEXTS, "TEXT")),
        written(tmp_path / "a.jsonl.gz", gzip.compress(lines(TEXTS, "text").encode())),
    ]
    kinds = {
        "text": pa.string(), "caption": pa.large_string(), "TEXT": pa.dictionary(pa.int32(), pa.string()),
    }  # fmt: skip
    for name, kind in kinds.items():
        table = pa.table({"id": range(len(TEXTS)), name: pa.array(TEXTS).cast(kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
        files.append(CaptionFile(tmp_path / f"{name}.parquet"))
    for file in files:
        assert read(file) == (READ, 0), file.path
        assert read(file) == (READ, 0), "a second time"
    assert len(files[0].sha256()) == 64 and files[0].sha256() != files[1].sha256()


def test_what_is_no_caption_is_skipped_and_counted(tmp_path):
    bad = ["a dog\0", "a \x1b[31mdog", "a dog \u202egod", "a dog " * 400, "\ue000"]
    text = "\n".join(["a dog", *bad, "a cat"]).encode() + b"\n\xff\xfe a bus\n" + b"x" * (3 * 2**20) + b"\na bus"
    assert read(written(tmp_path / "a.txt", text)) == (["a dog", "a cat", "a bus"], len(bad) + 2)
    odd = json.dumps({"text": "a \ud800 dog"}) + "\n" + json.dumps({"text": None}) + '\n{"text": "\xff"}\n'
    file = written(tmp_path / "a.jsonl", lines(["a dog", *bad]) + odd + lines(["a cat"]))
    assert read(file) == (["a dog", "ÿ", "a cat"], len(bad) + 2)
    values = [b"a dog", b"\xff\xfe", None, b"a cat", b"a\0dog"]
    array = pa.Array.from_buffers(pa.string(), 5, pa.array(values).buffers())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    assert read(CaptionFile(tmp_path / "a.parquet")) == (["a dog", "a cat"], 3)


def test_joiners_stay_within_words():
    assert cleaned("می\u200cخواهم") == "می\u200cخواهم"
    assert cleaned(" a\u00a0dog\n") == "a dog" and cleaned("e\u0301") == "é"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", '{"text": "a dog"}\n{"text": "a c', "line 2: no JSON"),
        ("a.jsonl", '{"text": "a dog"}\n\n["a cat"]\n', "line 3: no caption"),
        ("a.jsonl", '{"title": "a dog"}\n', "line 1: no caption"),
        ("a.jsonl", '{"caption": 7}\n', "line 1: no caption"),
        ("a.json", '[\n{"text": "a dog"}]', "line 1: no JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.txt.gz", b"a dog\n", "after line 0"),
        ("a.txt.gz", gzip.compress(b"a dog\n" * 9000, 0, mtime=0)[:-3000], "after line [0-9]+"),
        ("a.txt.gz", gzip.compress(b"a dog\n", mtime=0)[:-9] + b"123456789", "cannot be read"),
        ("a.parquet", b"PAR1 a dog PAR1", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_line(tmp_path, name, data, words):
    file = written(tmp_path / name, data)
    with pytest.raises(DiffuMaskError, match=words) as error:
        list(file)
    assert str(file.path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_page_of_parquet_is_one_sentence(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"a dog {i}" for i in range(9000)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200:900] = b"\xff" * 700
    with pytest.raises(DiffuMaskError, match="cannot be read"):
        list(written(path, bytes(data)))


@pytest.mark.parametrize("column", [pa.array([1]), pa.array([b"a dog"]), pa.array([["a dog"]])])
def test_parquet_without_a_column_of_text_names_those_it_has(tmp_path, column):
    pq.write_table(pa.table({"url": ["x"], "text": column}), tmp_path / "a.parquet")
    with pytest.raises(DiffuMaskError, match="no column of text that is named text, caption or TEXT: it has url, text"):
        list(CaptionFile(tmp_path / "a.parquet"))


def test_no_file_and_unknown_endings_are_refused(tmp_path):
    for name in ("a.csv", "a", "a.parquet.gz", "a.gz", "a.zip"):
        (tmp_path / name).write_text("a dog")
        with pytest.raises(DiffuMaskError, match=r"`captions` cannot be .*: give .txt"):
            CaptionFile(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    for name in ("folder.txt", "missing.txt"):
        with pytest.raises(DiffuMaskError, match="which is no file"):
            CaptionFile(tmp_path / name)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(st.binary(max_size=300), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))),
    name=st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"]),
)
def test_any_bytes_give_printable_captions_or_a_sentence(tmp_path, data, name):
    try:
        for caption in written(tmp_path / name, data):
            assert caption == " ".join(caption.split()) and 0 < len(caption) <= 1000
            assert caption.replace("\u200c", "").replace("\u200d", "").isprintable()
    except DiffuMaskError as error:
        assert "\n" not in str(error)


def test_a_long_file_and_a_long_line_are_read_in_flat_memory(tmp_path):
    with (tmp_path / "line.txt").open("wb") as file:
        file.truncate(2**25)  # zero bytes, without a line end
    many = written(tmp_path / "many.txt.gz", gzip.compress(b"a dog on the grass by the river\n" * 40_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in many) == 40_000
        assert read(CaptionFile(tmp_path / "line.txt")) == ([], 1)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
