"""dataset/run.py: a run can be killed at any moment and finished by the same command."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence

import pytest
from killed import kill_at
from samples import contents, draw, requests

from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.shard_check import finished_shards
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.planner import Plan, Recipe
from diffumask_fast.prompts.vocabulary import Vocabulary

OPTIONS = {"num": 7, "seed": 0, "guidance_scale": 5.0, "classes": None, "mask": {"threshold": "otsu"}}
ENVIRONMENT = {"torch": "2.13.0", "threads": 2}
MODEL = {"id": "mini", "weights": "0123"}


def begin(folder, options=OPTIONS, environment=ENVIRONMENT, shard_size=3, model=MODEL, plan=None, **keywords):
    plan = plan or requests(7)
    vocabulary = Vocabulary.parse("dog,car")
    return open_run(
        folder, plan, options, environment, shard_size, model=model, vocabulary=vocabulary, **keywords
    )  # fmt: skip


def finish(folder, shards=99, **keywords):
    with begin(folder, **keywords) as run:
        for index in run.missing_shards()[:shards]:
            run.write(index, [draw(request) for request in run.requests_of(index)])
    return contents(folder)


def test_a_whole_run(tmp_path):
    files = finish(tmp_path / "a" / "deep")
    assert list(files) == [*(f"data/shard-0000{index}.parquet" for index in range(3)), "dataset.json"]
    with begin(tmp_path / "a" / "deep") as run:
        assert run.missing_shards() == []
        keys = [row.key for row in run.rows(accepted_only=False, columns=["key"])]
        assert keys == [request.key for request in requests(7)]
        assert run.accepted_flags() == [draw(request).accepted for request in requests(7)]
    manifest = json.loads(files["dataset.json"])
    assert manifest["options"] == {**OPTIONS, "shard_size": 3}
    assert (manifest["model"], manifest["environment"], manifest["schema_version"]) == (MODEL, ENVIRONMENT, 1)
    assert manifest["classes"][1] == {"id": 7, "name": "car", "phrase": "car"}
    assert (manifest["plan"]["rows"], manifest["plan"]["shards"]) == (7, 3)
    assert finish(tmp_path / "a" / "deep") == files == finish(tmp_path / "b")


class Counted(Sequence):
    """A plan that counts how often each request is made."""

    def __init__(self, plan):
        self.plan, self.made = plan, Counter()

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, index):
        self.made.update([index])
        return self.plan[index]


def test_opening_plans_each_request_once(tmp_path):
    finish(tmp_path)
    plan = Counted(requests(7))
    begin(tmp_path, plan=plan).close()
    assert plan.made == dict.fromkeys(range(7), 1) | {7: 1}  # the last one ends the sequence


def test_killed_four_times_ends_with_the_same_bytes(tmp_path):
    out = tmp_path / "out"
    leftovers = []
    # before the manifest is there, in the first shard, in the second, in the last (the manifest of a begun run stays)
    for call in (1, 2, 3, 2):
        kill_at(call, finish, out)
        leftovers.append([name for name in contents(out) if name.endswith(".tmp")])
    shards = [[f"data/.shard-0000{index}.parquet.tmp"] for index in range(3)]
    assert leftovers == [[".dataset.json.tmp"], *shards]
    with begin(out) as run:
        assert run.missing_shards() == [2]
    assert finish(out) == finish(tmp_path / "whole")


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    files = finish(tmp_path)
    for name in (".dataset.json.tmp", ".preview.png.tmp", "data/.shard-00001.parquet.tmp", "notes.tmp", "data/x.tmp"):
        (tmp_path / name).write_text("half")
    assert finish(tmp_path) == files | {"notes.tmp": b"half", "data/x.tmp": b"half"}


def test_a_lost_shard_is_drawn_again(tmp_path):
    files = finish(tmp_path)
    (tmp_path / "data" / "shard-00001.parquet").unlink()
    with begin(tmp_path) as run:
        assert run.missing_shards() == [1] and run.requests_of(1) == requests(7)[3:6]
    assert finish(tmp_path) == files


def change(**changes):
    return {"options": {**OPTIONS, **changes}}


@pytest.mark.parametrize(
    "changes, words",
    [
        (change(seed=1), "`seed` was 0 and is 1 now"),
        (change(guidance_scale=7.5), "`guidance_scale` was 5.0 and is 7.5 now"),
        (change(classes="dog"), "`classes` was null and is dog now"),
        (change(mask={"threshold": 0.45}), "`mask.threshold` was otsu and is 0.45 now"),
        (change(size="128x128"), "`size` was not set and is 128x128 now"),
        (change(attention="xformers"), "`attention` was sdpa and is xformers now"),
        (change(num=8, seed=2), "`num` was 7 and is 8 now, `seed` was 0 and is 2 now"),
        ({"shard_size": 4}, "`shard_size` was 3 and is 4 now"),
        ({"model": {**MODEL, "id": "other"}}, "`model` was mini and is other now"),
        ({"model": {**MODEL, "weights": "4567"}}, "the model's weights was 0123 and is 4567 now"),
        ({"plan": requests(7, seed=9)}, "begun with other prompts"),
        ({"environment": {"torch": "2.14.0", "threads": 2}}, "torch was 2.13.0 and is 2.14.0 now.*`allow_drift`"),
    ],
)
def test_a_change_is_refused_by_name(tmp_path, changes, words):
    before = finish(tmp_path, shards=1)
    with pytest.raises(DiffuMaskError, match=words) as caught:
        begin(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_an_option_that_older_runs_have_not_recorded_is_the_default_there(tmp_path):
    before = finish(tmp_path, shards=1)["dataset.json"]
    assert finish(tmp_path, options={**OPTIONS, "attention": "sdpa"})["dataset.json"] == before


def test_drift_is_recorded_once_and_only_where_something_is_drawn(tmp_path):
    with begin(tmp_path) as run:
        run.write(0, [draw(request) for request in requests(7)[:3]])
    begin(tmp_path, allow_drift=True).close()
    assert "drift" not in json.loads((tmp_path / "dataset.json").read_text())

    other = {"torch": "2.14.0", "threads": 2}
    begin(tmp_path, environment=other, allow_drift=True).close()
    files = finish(tmp_path, environment=other, allow_drift=True)
    manifest = json.loads(files["dataset.json"])
    assert manifest["environment"] == ENVIRONMENT
    assert manifest["drift"] == [{"environment": other, "shards": [1, 2]}]
    third = {"torch": "2.15.0", "threads": 2}
    assert finish(tmp_path, environment=third, allow_drift=True) == files  # nothing was left to draw


def test_tuples_and_ints_survive_json(tmp_path):
    options = {"size": (64, 128), "scales": {1: 2}}
    assert finish(tmp_path, options=options) == finish(tmp_path, options=options)


def test_two_runs_in_one_folder(tmp_path):
    with begin(tmp_path):
        with pytest.raises(DiffuMaskError, match="another run is writing"):
            begin(tmp_path)
    begin(tmp_path).close()
    assert list(contents(tmp_path)) == ["dataset.json"]


def test_a_run_that_raised_lets_go_of_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), begin(tmp_path):
        raise ZeroDivisionError
    finish(tmp_path, shards=1)
    with pytest.raises(DiffuMaskError, match="`num`"):
        begin(tmp_path, **change(num=9))
    begin(tmp_path).close()


def test_a_run_that_has_drawn_nothing_binds_nobody(tmp_path):
    begin(tmp_path, **change(seed=3)).close()
    assert finish(tmp_path) == finish(tmp_path.with_name("fresh"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(DiffuMaskError, match="no manifest"):
        begin(tmp_path / "other")


def test_a_shard_takes_its_own_samples(tmp_path):
    with begin(tmp_path) as run:
        part = run.requests_of(0)
        for wrong in (part[:2], part[::-1], requests(7)[3:6]):
            with pytest.raises(DiffuMaskError, match="shard 0 takes the samples of its requests"):
                run.write(0, [draw(request) for request in wrong])
        assert len(run.missing_shards()) == 3


def test_folders_that_hold_something_else(tmp_path):
    finish(tmp_path)
    (tmp_path / "dataset.json").write_text('{"schema_version": 1, "world": true}')
    with pytest.raises(DiffuMaskError, match="no manifest"):
        begin(tmp_path)
    (tmp_path / "dataset.json").write_text("{half")
    with pytest.raises(DiffuMaskError, match="no manifest"):
        begin(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DiffuMaskError, match="holds shards but no dataset.json"):
        begin(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffuMaskError, match="no folder|cannot write"):
        begin(tmp_path / place)


def test_requests_that_make_no_run(tmp_path):
    with pytest.raises(DiffuMaskError, match="each key once"):
        open_run(tmp_path, [*requests(1), *requests(1)], {}, {})
    with pytest.raises(DiffuMaskError, match="at least one request"):
        open_run(tmp_path, [], {}, {})
    with pytest.raises(DiffuMaskError, match="`shard_size` must be a whole number from 1 on, not 0"):
        open_run(tmp_path, requests(1), {}, {}, 0)
    assert not list(tmp_path.iterdir())


def test_hostile_prompts_come_back(tmp_path):
    prompt = 'a "dog", \u202e../../x\n\t犬 \U0001f415, {objects}; DROP'
    plan = [dataclasses.replace(request, prompt=prompt, negative_prompt="'") for request in requests(2)]
    with open_run(tmp_path, plan, {}, {}) as run:
        run.write(0, [draw(request) for request in plan])
        rows = list(run.rows(accepted_only=False))
    assert [(row.prompt, row.negative_prompt) for row in rows] == [(prompt, "'")] * 2


@pytest.mark.parametrize("name", ["data", "dataset.json", "preview.png", "data/shard-00000.parquet"])
def test_a_planted_link_is_not_followed(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    finish(elsewhere)
    (elsewhere / "preview.png").write_bytes(b"theirs")
    before, out = contents(elsewhere), tmp_path / "out"
    (out / "data").mkdir(parents=True)
    if name == "data":
        (out / "data").rmdir()
    elif name.startswith("data/"):
        (out / "dataset.json").write_bytes((elsewhere / "dataset.json").read_bytes())
    (out / name).symlink_to(elsewhere / name)
    with pytest.raises(DiffuMaskError, match=f"{name} is (a link|there and was not written)"):
        finish(out)
    assert contents(elsewhere) == before


def test_a_preview_that_is_not_ours_stops_a_run_before_it_draws(tmp_path):
    (tmp_path / "preview.png").write_bytes(b"a photograph")
    with pytest.raises(DiffuMaskError, match="preview.png is there and was not written by this program"):
        begin(tmp_path)
    assert list(contents(tmp_path)) == ["preview.png"]


ROUNDS = [{"dog": 3, "car": 3}, {"dog": 3}]


def rounds_of(num):
    counts = [tuple(one.get(name, 0) for name in ("dog", "car")) for one in ROUNDS[:num]]
    return Plan(Recipe(Vocabulary.parse("dog,car"), sum(map(sum, counts)), rounds=counts))


def test_a_run_grows_by_rounds_and_its_shards_stay(tmp_path):
    with begin(tmp_path / "a", plan=rounds_of(1), rounds=ROUNDS[:1]) as run:
        for index in run.missing_shards():
            run.write(index, [draw(request) for request in run.requests_of(index)])
        first = contents(tmp_path / "a")
        run.extend(rounds_of(2), ROUNDS)
        assert run.missing_shards() == [2] and list(run.shards) == [0, 1, 2]
        run.write(2, [draw(request) for request in run.requests_of(2)])
    manifest = json.loads((tmp_path / "a" / "dataset.json").read_text())
    last = manifest["plan"].pop("rounds")[-1]
    assert last == {**manifest["plan"], "classes": {"dog": 3}} and last["rows"] == 9
    whole = finish(tmp_path / "b", plan=rounds_of(2), rounds=ROUNDS)
    assert contents(tmp_path / "a") == whole and first.items() - whole.items() == {
        ("dataset.json", first["dataset.json"])
    }
    with begin(tmp_path / "a", plan=rounds_of(2), rounds=ROUNDS) as run:
        assert run.missing_shards() == []
    assert len(finished_shards(tmp_path / "a", read_manifest(tmp_path / "a"))) == 3


def test_a_round_follows_those_that_are_there(tmp_path):
    with begin(tmp_path, plan=rounds_of(1), rounds=ROUNDS[:1]) as run:
        before = contents(tmp_path)
        with pytest.raises(DiffuMaskError, match="not those that the new one follows"):
            run.extend(requests(9), [{"dog": 6}, {"dog": 3}])
    assert contents(tmp_path) == before


def test_a_smaller_batch_is_recorded_for_the_shards_that_have_it(tmp_path):
    with begin(tmp_path) as run:
        assert run.batch_sizes() == {}
        run.write(0, [draw(request) for request in run.requests_of(0)])
        run.reduce_batch_size(4, [1, 2])
        run.reduce_batch_size(2, [2])
    with begin(tmp_path) as run:
        assert run.batch_sizes() == {1: 4, 2: 2}
        assert [drift["environment"] for drift in run.manifest["drift"]] == [ENVIRONMENT, ENVIRONMENT]
    with begin(tmp_path, environment={**ENVIRONMENT, "threads": 4}, allow_drift=True) as run:
        assert run.batch_sizes() == {1: None, 2: None}
