"""kernels/tune.py: how the best configuration is chosen and written; the times are a GPU's."""

import json

import pytest
import torch
from test_cli import refused
from triton.runtime.errors import OutOfResources

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import tune, tuned
from diffumask_fast.kernels.tune import Case, as_text, best, cases, write

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


@pytest.mark.parametrize(
    ("times", "block", "impl", "us"),
    [
        ({32: 0.3, 64: 0.1, 128: 0.2, None: 0.15}, 64, "triton", [100.0, 150.0]),
        ({32: 0.3, 64: 0.2, 128: 0.2, None: 0.2}, 64, "torch", [200.0, 200.0]),
        ({32: 0.3, 64: None, 128: None, None: 0.4}, 32, "triton", [300.0, 400.0]),
        ({32: None, 64: None, 128: None, None: 0.4}, 32, "torch", [None, 400.0]),
    ],
    ids=["fastest", "torch in a tie", "those that fit", "none fits"],
)
def test_the_fastest_configuration_that_fits_is_kept(times, block, impl, us):
    case = Case("attend", {"pixels": 64}, CONFIGS, lambda config: config["block"], lambda: None)
    assert best(case, timed(times)) == {"when": {"pixels": 64}, "launch": {"block": block}, "impl": impl, "us": us}


def test_a_devices_entries_replace_its_old_ones_alone(tmp_path):
    file = tmp_path / "table.json"
    write(file, "GPU A", {"attend": [{"when": {}, "launch": {"block": 1}}]})
    write(file, "GPU B", {"attend": [{"when": {}, "launch": {"block": 2}}]})
    write(file, "GPU A", {"attend": [{"when": {}, "launch": {"block": 3}}]})
    table = json.loads(file.read_text())
    assert table.pop("GPU A")["attend"][0]["launch"] == {"block": 3}
    assert table.pop("GPU B")["attend"][0]["launch"] == {"block": 2}
    assert table == json.loads(tuned.FILE.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_failed_write_leaves_the_old_table_and_is_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    write(file, "GPU", {})
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune.os, "fsync", full)
    with pytest.raises(DiffuMaskError, match="No space left on device.*--out"):
        write(file, "GPU", {"attend": []})
    assert file.read_bytes() == before


def test_the_committed_table_is_as_tune_would_write_it():
    text = tuned.FILE.read_text(encoding="utf-8")
    assert as_text(json.loads(text)) == text


def test_each_case_runs_and_its_facts_find_its_entry(monkeypatch):
    monkeypatch.setattr(tune, "LAYERS", ((16, 2, 16),))
    monkeypatch.setattr(tune, "IMAGES", 1)
    found = []
    for case in cases(CPU):
        if case.kernel != "attend":
            break
        case.run(case.configs[0])
        case.plain()
        entry = best(case, lambda workload: 1.0)
        table = {"GPU": {"attend": [entry]}, "*": {"attend": []}}
        assert tuned.find(table, "attend", "GPU", case.when) is entry
        assert set(entry["launch"]) == set(tuned.launch("attend", CPU, **case.when))
        found.append(case.when["dtype"])
    assert found == ["fp16", "bf16"]


def test_the_other_configurations_have_what_their_kernels_take(monkeypatch):
    plain = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **k: plain(*(min(one, 6) for one in size), **k))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **k: ones(*(min(one, 6) for one in size), **k))
    monkeypatch.setattr(tune, "LAYERS", ())
    monkeypatch.setattr(tune, "IMAGES", 1)
    facts = {"guided_filter": {"height": 512, "width": 512}, "mean_field": {"window": 11}}
    for case in cases(CPU):
        assert set(case.configs[0]) == set(tuned.launch(case.kernel, CPU, **facts[case.kernel]))
        case.run(case.configs[-1])
        case.plain()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence():
    assert "torch sees none here" in refused("tune")
