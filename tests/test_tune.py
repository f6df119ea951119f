"""kernels/tune.py: how the best configuration is chosen and written; the times are a GPU's."""

import json

import pytest
import torch
from cuda_stand_in import stand_in
from test_cli import refused
from triton.runtime.errors import OutOfResources

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import tune, tuned
from diffumask_fast.kernels.tune import Case, Impl, as_text, best, cases, write

CPU = torch.device("cpu")
CONFIGS = [{"block": block} for block in (32, 64, 128)]


def timed(times):
    """Return a timer that runs the workload and says what the workload says."""

    def milliseconds(workload):
        found = times[workload()]
        if found is None:
            raise OutOfResources(1, 2, "shared memory")
        return found

    return milliseconds


def case_of(**more):
    """A case whose implementations return the configuration that they were called with."""
    impls = {"triton": Impl("attend", CONFIGS, lambda config: ("triton", config["block"]))}
    impls |= {name: Impl(name, CONFIGS[:2], lambda config, name=name: (name, config["block"])) for name in more}
    return Case({"pixels": 64}, impls, lambda: "torch")


@pytest.mark.parametrize(
    ("times", "block", "impl", "us"),
    [
        ((0.3, 0.1, 0.2, 0.15), 64, "triton", {"triton": 100.0, "torch": 150.0}),
        ((0.3, 0.2, 0.2, 0.2), 64, "torch", {"triton": 200.0, "torch": 200.0}),
        ((0.3, None, None, 0.4), 32, "triton", {"triton": 300.0, "torch": 400.0}),
        ((None, None, None, 0.4), 32, "torch", {"torch": 400.0}),
    ],
    ids=["fastest", "torch in a tie", "those that fit", "none fits"],
)
def test_the_fastest_configuration_that_fits_is_kept(times, block, impl, us):
    keys = [("triton", 32), ("triton", 64), ("triton", 128), "torch"]
    found = best(case_of(), timed(dict(zip(keys, times, strict=True))))
    assert found == {"attend": {"when": {"pixels": 64}, "launch": {"block": block}, "impl": impl, "us": us}}


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_configuration_that_computes_something_else_is_left_out(wrong, caplog):
    maps = torch.ones(4)

    def run(config):
        maps.add_(wrong if config["block"] == 32 else 1.0)
        return torch.full((2,), wrong if config["block"] == 64 else 1.001)

    def plain():
        maps.add_(1.0)
        return torch.ones(2)

    case = Case({}, {"triton": Impl("attend", CONFIGS, run)}, plain, maps)
    found = best(case, lambda workload: 0.1 if workload is plain else 0.01 * workload.args[0]["block"] / 128)["attend"]
    assert found["launch"] == {"block": 128} and found["impl"] == "triton"
    assert [line.count("its result is not torch's") for line in caplog.messages] == [1, 1]


def test_each_kernel_of_a_case_gets_its_launch_and_the_first_the_choice():
    times = {("triton", block): 0.3 for block in (32, 64, 128)} | {("maps", 32): 0.2, ("maps", 64): 0.1, "torch": 0.2}
    found = best(case_of(maps=True), timed(times))
    assert found["maps"] == {"when": {"pixels": 64}, "launch": {"block": 64}}
    assert found["attend"]["impl"] == "maps" and found["attend"]["us"]["maps"] == 100.0


def test_new_entries_come_before_the_older_ones_and_replace_those_of_the_same_facts(tmp_path):
    file = tmp_path / "table.json"

    def entry(n, block):
        return {"when": {"n": n}, "launch": {"block": block}}

    write(file, "GPU A", {"attend": [entry(1, 1), entry(2, 2)], "mean_field": [entry(0, 7)]})
    write(file, "GPU B", {"attend": [entry(1, 4)]})
    write(file, "GPU A", {"attend": [entry(2, 3)]})
    table = json.loads(file.read_text())
    assert table.pop("GPU A") == {"attend": [entry(2, 3), entry(1, 1)], "mean_field": [entry(0, 7)]}
    assert table.pop("GPU B") == {"attend": [entry(1, 4)]}
    assert table == json.loads(tuned.FILE.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_failed_write_leaves_the_old_table_and_is_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    write(file, "GPU", {})
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune.os, "fsync", full)
    with pytest.raises(DiffuMaskError, match="No space left on device.*`out`"):
        write(file, "GPU", {"attend": []})
    assert file.read_bytes() == before


FOREIGN = {
    "text": "my notes", "nothing": "", "list": "[1, 2]", "object": '{"a": {"b": 1}}',
    "half": '{"x": {"attend": [{"when": {"n": 1}}]}}',
    "more": '{"note": 1, "x": {"y": [{"when": {"n": 1}, "launch": {}}]}}',
}  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_table_is_never_replaced(tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    said = refused("tune", "--quick", "--out", file)
    assert str(file) in said and "move it away" in said
    assert file.read_text() == text and list(tmp_path.iterdir()) == [file]


def test_a_link_is_no_place_for_a_table(tmp_path):
    write(tmp_path / "table.json", "GPU", {})
    before = (tmp_path / "table.json").read_bytes()
    (tmp_path / "link.json").symlink_to("table.json")
    with pytest.raises(DiffuMaskError, match="link.json is there and was not written by this program"):
        tune.tune(tmp_path / "link.json", quick=True, only_this_device=False)
    assert (tmp_path / "table.json").read_bytes() == before
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".new.json.part").symlink_to("other")
    write(tmp_path / "new.json", "GPU", {})
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "new.json").is_symlink()


def test_the_committed_table_is_as_tune_would_write_it():
    text = tuned.FILE.read_text(encoding="utf-8")
    assert as_text(json.loads(text)) == text


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tune, "LAYERS", [(16, 2, 16)])
    monkeypatch.setattr(tune, "IMAGES", 1)
    monkeypatch.setattr(tune, "SIDE", 16)
    monkeypatch.setattr(tune, "RADII", {2: [1, 16]})
    monkeypatch.setattr(tune, "CALLS", 1)
    monkeypatch.setattr(tune, "REPLAYS", 1)


def test_every_case_runs_and_its_facts_find_its_entries(small):
    kernels = []
    for case in cases(CPU):
        facts = {"radius": 2, "window": 11} | case.when if case.when.get("dtype") else {"radius": 2, "window": 11}
        for impl in case.impls.values():
            impl.run(impl.configs[-1])
            assert set(impl.configs[0]) == set(tuned.launch(impl.kernel, CPU, **facts)) - {"widest"}
        case.plain()
        for kernel, entry in best(case, lambda workload: 1.0).items():
            table = {"GPU": {kernel: [entry]}, "*": {kernel: []}}
            assert tuned.find(table, kernel, ["GPU"], facts) is entry
            kernels.append((kernel, case.when.get("dtype")))
    attention = [(kernel, dtype) for dtype in ("fp16", "bf16") for kernel in ("attend", "attend_maps")]
    assert kernels == [*attention, ("guided_filter", None), ("mean_field", None)]


@pytest.mark.parametrize("only_this_device", [False, True])
def test_what_is_finished_is_written_for_the_architecture_or_the_device(small, tmp_path, monkeypatch, only_this_device):
    file, written = tmp_path / "table.json", []
    plain = tune.write
    monkeypatch.setattr(tune, "write", lambda *given: (plain(*given), written.append(file.read_bytes())))
    with stand_in():
        key = tuned.names(torch.device("cuda"))[not only_this_device]
        found = tune.tune(file, quick=True, only_this_device=only_this_device)
    assert list(found) == ["attend", "attend_maps", "guided_filter"]
    table = json.loads(file.read_text())[key]
    assert {name: table[name][: len(entries)] for name, entries in found.items()} == found
    assert ("sm_90" == key) != only_this_device
    first = json.loads(written[0])[key]
    assert len(written) == 2 and found["guided_filter"][0] not in first.get("guided_filter", [])


def test_a_time_is_that_of_a_call_in_a_replayed_graph(monkeypatch):
    monkeypatch.setattr(tune, "CALLS", 4)
    with stand_in():
        x = torch.zeros(1, device="cuda")
        seconds = tune._milliseconds(lambda: x.add_(1)) / 1000
        assert x.item() == 1 + 4 + 4 * tune.REPLAYS and 0 < seconds < 0.1


def test_several_processes_share_the_configurations(small, monkeypatch):
    launched = []
    impl = Impl("attend", [{"block": block} for block in range(7)], lambda config: launched.append(config["block"]))
    monkeypatch.setattr(tune, "cases", lambda device, quick: [Case({}, {"triton": impl}, dict)])
    for part in range(3):
        tune.warm(part, 3)
    assert launched == [0, 3, 6, 1, 4, 2, 5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence():
    assert "torch sees none here" in refused("tune")
