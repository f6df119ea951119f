"""dataset/storage.py: datasets in object stores, one in memory and a real S3 server on the loopback address."""

import importlib
import json
import logging
import uuid
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from s3_server import s3_server
from samples import contents, draw, requests
from test_run import begin, change, finish

from diffumask_fast.dataset.lookup import RowLookup
from diffumask_fast.dataset.parts import Part
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.storage import Address, check_own_place, place, size_of
from diffumask_fast.dataset.verify import verify
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.generation.rebuild import rebuild
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.evaluation import evaluate
from diffumask_fast.learning.filtering import filter_dataset
from diffumask_fast.learning.options import AugmentOptions, EvaluateOptions, FilterOptions, PruneOptions, TrainOptions
from diffumask_fast.report.options import ReportOptions
from diffumask_fast.report.page import write_report


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def healthy(server):
    yield server
    server.fault = lambda method, path: False


@pytest.fixture(params=["memory", "s3"])
def url(request, healthy):
    """An address where nothing is yet."""
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


def stored(url):
    """Return name -> bytes of all files at an address."""
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(path).lstrip("/"): files.cat_file(name) for name in sorted(files.find(path))}


def write(run, shards=99):
    for index in run.missing_shards()[:shards]:
        run.write(index, [draw(request) for request in run.requests_of(index)])


def test_what_names_a_place():
    assert place("s3://bucket/a/b/") == Address("s3://bucket/a/b") == place(Address("s3://bucket/a/b"))
    assert place("some/folder") == place(Path("some/folder")) == Path("some/folder")
    assert place("file:///tmp/x") == Path("/tmp/x") and place("C:/x") == Path("C:/x")
    shard = place("gs://bucket") / "data" / "shard-00000.parquet"
    assert (shard.name, shard.stem, str(shard.with_name("x"))) == (
        "shard-00000.parquet", "shard-00000", "gs://bucket/data/x"
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///", "memory://", "S3://bucket", "simplecache::s3://bucket/x", Path("s3://bucket/x")]
)
def test_what_names_none(text):
    with pytest.raises(DiffuMaskError, match="names no place|give it as text"):
        place(text)


@pytest.mark.parametrize(
    "options", [lambda out: TrainOptions("data", out), lambda out: EvaluateOptions("m", "data", sheet=out)]
)
def test_what_is_local_takes_no_address(options):
    with pytest.raises(DiffuMaskError, match="must be a local path, not an address"):
        options(Path("s3://bucket/x"))


def test_files_at_an_address(url):
    top = place(url)
    assert not top.exists() and list(top.glob("data/*")) == []
    with pytest.raises(FileNotFoundError):
        (top / "data" / "a").read_bytes()
    (top / "data" / "a.x").put(b"abcdef")
    (top / "data" / "b.y").put(b"b")
    with pytest.raises(FileExistsError):
        (top / "data" / "b.y").put(b"c", new=True)
    assert list(top.glob("data/*.x")) == [top / "data" / "a.x"] and list(top.glob("*")) == [top / "data"]
    file = top / "data" / "a.x"
    assert top.exists() and file.is_file() and not top.is_file() and size_of(file) == 6
    assert (top / "data" / "b.y").read_text() == "b"
    with file.open() as stream:
        assert (stream.seek(2), stream.read(3), stream.tell(), stream.read()) == (2, b"cde", 5, b"f")
    assert stream.closed


def test_a_run_at_an_address_has_the_bytes_of_one_in_a_folder(url, tmp_path):
    with begin(url) as run:
        write(run, 2)
        assert run.missing_shards() == [2]
    with begin(url) as run:
        assert run.missing_shards() == [2]
        write(run)
        assert run.show(None, 10**6) == 0
    files = stored(url)
    assert files.pop("preview.png")[:4] == b"\x89PNG" and files.pop("README.md")[:4] == b"---\n"
    assert files == finish(tmp_path)
    keys = [request.key for request in requests(7)]
    assert [row.key for row in read_rows(url, accepted_only=False)] == keys
    assert [row.image.shape for row in RowLookup(url, accepted_only=False)] == [(24, 40, 3)] * 7


def test_parts_at_an_address(url, tmp_path):
    with begin(url, part=Part(0, 2)) as first, begin(url, part=Part(1, 2)) as second:
        with pytest.raises(DiffuMaskError, match="`seed` was 0 and is 1 now"):
            begin(url, part=Part(1, 2), **change(seed=1))
        write(second)
        assert second.show(None, 10**6) == 2
        write(first)
        assert first.show(None, 10**6) == 0
    files = stored(url)
    assert files.pop("preview.png") and files.pop("README.md") and files == finish(tmp_path)


def test_two_parts_that_begin_at_the_same_moment(url, monkeypatch):
    """Both found no manifest; the one that writes second sees what the first wrote."""
    begin(url, part=Part(0, 2), **change(seed=1)).close()
    exists = Address.exists
    monkeypatch.setattr(Address, "exists", lambda self: self.name != "dataset.json" and exists(self))
    with pytest.raises(DiffuMaskError, match="`seed` was 1 and is 0 now"):
        begin(url, part=Part(1, 2))
    assert json.loads(stored(url)["dataset.json"])["options"]["seed"] == 1


def test_what_is_at_an_address_is_kept(url, tmp_path, caplog):
    files = finish(tmp_path)
    (place(url) / "preview.png").put(b"a photograph")
    with pytest.raises(DiffuMaskError, match="preview.png is there and was not written by this program"):
        check_own_place(place(url) / "preview.png")
    with pytest.raises(DiffuMaskError, match="preview.png is there"):
        begin(url)
    for name, data in files.items():
        (place(f"{url}/new") / name).put(data)
    (place(f"{url}/new/data") / "shard-00001.parquet").put(files["data/shard-00001.parquet"][:-20])
    with caplog.at_level(logging.WARNING), begin(f"{url}/new") as run:
        assert run.missing_shards() == [1] and "is damaged: it is made anew" in caplog.text
        write(run)
    assert stored(f"{url}/new") == files
    (place(f"{url}/new/data") / "shard-00001.parquet").put(files["data/shard-00000.parquet"])
    with pytest.raises(DiffuMaskError, match="was not written for its place"):
        begin(f"{url}/new")


def test_a_put_that_fails_half_way(healthy, tmp_path):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    with begin(url) as run:
        write(run, 1)
        healthy.fault = lambda method, path: method == "PUT" and path.endswith("shard-00001.parquet")
        with pytest.raises(
            DiffuMaskError, match="shard-00001.parquet cannot be written .*: run the same command"
        ) as told:
            write(run)
        assert "\n" not in str(told.value) and run.missing_shards() == [1, 2]
    assert list(stored(url)) == ["data/shard-00000.parquet", "dataset.json"]
    healthy.fault = lambda method, path: False
    with begin(url) as run:
        assert run.missing_shards() == [1, 2]
        write(run)
    assert stored(url) == finish(tmp_path)


def test_a_shard_is_put_once_and_looked_at_in_few_requests(healthy):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    with begin(url) as run:
        write(run)
    puts = [path.rpartition("/")[2] for method, path in healthy.requests if method == "PUT" and url[4:] in path]
    assert sorted(puts) == ["dataset.json", *(f"shard-0000{index}.parquet" for index in range(3))]
    healthy.requests.clear()
    begin(url).close()
    looks = [method for method, path in healthy.requests if path.endswith("shard-00000.parquet")]
    assert len(looks) <= 6, looks


def test_a_store_that_cannot_be_read_is_no_damaged_shard(healthy):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    with begin(url) as run:
        write(run)
    before = stored(url)
    healthy.fault = lambda method, path: method == "GET" and path.endswith(".parquet")
    with pytest.raises(DiffuMaskError, match="shard-00000.parquet cannot be read"):
        begin(url)
    healthy.fault = lambda method, path: "dataset.json" in path
    with pytest.raises(DiffuMaskError, match="dataset.json cannot be read"):
        begin(url)
    healthy.fault = lambda method, path: False
    assert stored(url) == before


def test_a_bucket_that_is_not_there(healthy):
    with pytest.raises(DiffuMaskError, match="there is no s3://nowhere: make that bucket, or name another"):
        begin("s3://nowhere/x")
    with pytest.raises(DiffuMaskError, match="holds no data/shard"):
        list(read_rows("s3://nowhere/x"))


def test_missing_credentials(healthy, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DiffuMaskError, match="Unable to locate credentials.*set credentials .* by AWS_ACCESS_KEY_ID"):
        begin("s3://bucket/x")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "protocol, package", [("s3", "'diffumask-fast\\[s3\\]'"), ("gs", "gcsfs"), ("abfs", "adlfs"), ("nope", None)]
)
def test_a_missing_package_is_named(protocol, package, monkeypatch):
    registry = importlib.import_module("fsspec.registry")
    missing = {"class": "nowhere.Nothing", "err": f"Please install {package} to access {protocol}"}
    if package:
        monkeypatch.setitem(registry.known_implementations, protocol, missing)
        monkeypatch.delitem(registry._registry, protocol, raising=False)
    words = (
        f"{protocol}:// needs a package that is missing: .*{package}" if package else "no object store goes by nope://"
    )
    with pytest.raises(DiffuMaskError, match=words) as told:
        begin(f"{protocol}://bucket/x")
    assert "\n" not in str(told.value)


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    monkeypatch.setattr(Address, "put", lambda self, data: data.nothing)
    with pytest.raises(AttributeError):
        begin("memory://bucket/mistake")


def silent(total=None):
    return nullcontext(SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None, update=lambda *_, **__: 0))


def drawn(out, **changes):
    settings = {"num": 4, "shard_size": 2, "steps": 2, "seed": 3, "device": "cpu", "classes": "dog,cat"}
    return run_generate(GenerateOptions(out, **settings | changes), silent)


def test_generate_and_what_reads_at_an_address(url, tmp_path):
    assert drawn(f"{url}/run")["drawn"] == 4 and drawn(f"{url}/run")["drawn"] == 0
    drawn(tmp_path / "run")
    assert stored(f"{url}/run") == contents(tmp_path / "run")

    where = {f"{url}/run": url, str(tmp_path / "run"): tmp_path}
    figures = [evaluate(EvaluateOptions("mini-oracle", data), progress=silent) for data in where]
    assert figures[0] == figures[1] and figures[0]["n"] == 4
    for data, out in where.items():
        remask(data, f"{out}/remasked", progress=silent)
        augment(AugmentOptions(data, f"{out}/augmented", all=True), progress=silent)
        pruning = PruneOptions(alpha=0.5, rank="quality")
        filter_dataset(FilterOptions(f"{out}/remasked", f"{out}/filtered", pruning), progress=silent)
    assert stored(url) == contents(tmp_path)
    data = open_data(f"{url}/run", accepted_only=False)
    assert len(data) == 4 and data[0].labels.shape == (128, 128)
    checked = verify(f"{url}/run")
    assert (checked["images"], checked["faults"]) == (4, [])
    assert rebuild(f"{url}/run", data.names[2])["equal"]
    pages = [tmp_path / f"page-{number}.html" for number in range(2)]
    for number, page in enumerate(pages):
        write_report(ReportOptions(list(where)[number], page))
    assert pages[0].read_bytes() == pages[1].read_bytes()
    with pytest.raises(DiffuMaskError, match="is no local folder: say by `out` where the page goes"):
        write_report(ReportOptions(f"{url}/run"))
    with pytest.raises(DiffuMaskError, match="is an address, and segmenters are trained in a folder: rank by quality"):
        filter_dataset(FilterOptions(f"{url}/run", f"{url}/trained"), progress=silent)
    with pytest.raises(DiffuMaskError, match="one lies in the other"):
        remask(f"{url}/run", f"{url}/run/inside", progress=silent)
    with pytest.raises(DiffuMaskError, match="holds no data"):
        open_data(f"{url}/nothing")
