"""dataset/derive.py: a dataset made of another one is bound to its folder and finished as a run is."""

import json
from dataclasses import dataclass

import pytest
from killed import kill_at
from samples import contents, draw, requests

from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.folder import DatasetFolder
from diffumask_fast.dataset.licence import Licence, licence_of
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import Options, number, option


@dataclass(frozen=True)
class Cut(Options):
    cut: float = option(0.5, "Reject rows of lower quality.", number(0, 1))


def dataset(folder, shards=3, seed=0):
    with open_run(folder, requests(7, seed=seed), {"seed": seed}, {"torch": "2"}, 3) as run:
        for index in run.missing_shards()[:shards]:
            run.write(index, [draw(request) for request in run.requests_of(index)])
    return folder


def cut_off(options):
    def transform(rows):
        return ({**row.values, "accepted": min(row.quality) >= options.cut} for row in rows)

    return transform


def derived(source, out, cut=0.5):
    return derive(source, out, cut_off(Cut(cut)), Cut(cut))


def test_shards_options_and_summary(tmp_path):
    summary = derived(dataset(tmp_path / "a"), tmp_path / "b", cut=0.4)
    manifests = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in "ab"]
    assert manifests[1] == manifests[0] | {"options": {"seed": 0, "shard_size": 3, "cut": 0.4}}
    names = [f"data/shard-0000{index}.parquet" for index in range(3)]
    assert list(contents(tmp_path / "b")) == ["README.md", *names, "dataset.json", "preview.png"]
    accepted = sum(min(draw(request).quality) >= 0.4 for request in requests(7))
    assert summary == {"folder": str(tmp_path / "b"), "images": 7, "accepted": accepted} and 0 < accepted < 7


def test_the_licence_is_that_of_the_source(tmp_path):
    (dataset(tmp_path / "a") / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    derived(tmp_path / "a", tmp_path / "b")
    assert licence_of(tmp_path / "b") == Licence("cc0-1.0")


def test_run_again_it_makes_what_is_missing_alone(tmp_path):
    source, seen = dataset(tmp_path / "a"), []
    first, whole = derived(source, tmp_path / "b"), contents(tmp_path / "b")
    (tmp_path / "b" / "data" / "shard-00001.parquet").unlink()
    (tmp_path / "b" / "data" / ".shard-00001.parquet.tmp").write_text("half")

    def transform(rows):
        for row in cut_off(Cut())(rows):
            seen.append(row["key"])
            yield row

    again = derive(source, tmp_path / "b", transform, Cut())
    assert again == first and contents(tmp_path / "b") == whole
    assert seen == [request.key for request in requests(7)[3:6]]


def test_killed_it_ends_with_the_same_bytes(tmp_path):
    source = dataset(tmp_path / "a")
    derived(source, tmp_path / "whole")
    # before the manifest is there, in the first shard, in the second, before the preview
    for call in (1, 2, 2, 3):
        kill_at(call, derived, source, tmp_path / "b")
        assert any(name.endswith(".tmp") for name in contents(tmp_path / "b"))
    derived(source, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_one_writer_at_a_time(tmp_path):
    source = dataset(tmp_path / "a")
    with DatasetFolder(tmp_path / "b"), pytest.raises(DiffuMaskError, match="another run is writing in .*b: wait"):
        derived(source, tmp_path / "b")
    with open_run(tmp_path / "c", requests(7), {}, {}, 3), pytest.raises(DiffuMaskError, match="another run"):
        derived(source, tmp_path / "c")

    def meanwhile(rows):
        with pytest.raises(DiffuMaskError, match="another run is writing"):
            derived(source, tmp_path / "d", cut=0.1)
        with pytest.raises(DiffuMaskError, match="another run is writing"):
            dataset(tmp_path / "d")
        return cut_off(Cut())(rows)

    derive(source, tmp_path / "d", meanwhile, Cut())
    derived(source, tmp_path / "whole")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_what_differs_is_named_and_nothing_is_changed(tmp_path):
    source = dataset(tmp_path / "a")
    derived(source, tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="`cut` was 0.5 and is 0.7 now"):
        derived(source, tmp_path / "b", cut=0.7)
    with pytest.raises(DiffuMaskError, match="options: `seed` was 0 and is 1 now; use"):
        derived(dataset(tmp_path / "other", seed=1), tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="`cut` was 0.5 and is not set now"):
        dataset(tmp_path / "b")
    assert contents(tmp_path / "b") == before


def test_folders_that_are_not_two(tmp_path):
    source = dataset(tmp_path / "a")
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for out in (source, tmp_path / "link", source / "new", tmp_path, source / "data"):
        with pytest.raises(DiffuMaskError, match="one folder, or one lies in the other"):
            derived(source, out)
    assert contents(source) == before


@pytest.mark.parametrize("text", ['{"labels": "of another program"}', '{"schema_version": 1}', "{half", "[]"])
def test_other_peoples_files_stay(tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text(text)
    with pytest.raises(DiffuMaskError, match="dataset.json"):
        derived(tmp_path / "mine", tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="dataset.json"):
        derived(dataset(tmp_path / "a"), tmp_path / "mine")
    assert (tmp_path / "mine" / "dataset.json").read_text() == text and not (tmp_path / "b").exists()


def test_a_source_that_is_not_finished(tmp_path):
    with pytest.raises(DiffuMaskError, match="shard-00002.parquet is missing, one of 1"):
        derived(dataset(tmp_path / "a", shards=2), tmp_path / "b")
    (tmp_path / "a" / "data" / "shard-00000.parquet").unlink()
    with pytest.raises(DiffuMaskError, match="shard-00000.parquet is missing, one of 2"):
        derived(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="dataset.json is missing"):
        derived(tmp_path / "nothing", tmp_path / "b")
    assert not (tmp_path / "b").exists()
