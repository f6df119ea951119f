"""kernels/tuned.py and tuned.json: which launch configuration a layer gets, and which implementation."""

import importlib
import json

import pytest
import torch
from cuda_stand_in import stand_in

from diffumask_fast.kernels import attend, guided_filter, ran, tuned

LAYER = {"dtype": "fp16", "heads": 8, "head_dim": 40, "pixels": 4096, "keys": 77}
CPU = torch.device("cpu")


@pytest.fixture
def entries(monkeypatch):
    """Replace the table; the entries' device is the one that the tests ask for."""

    def replace(found):
        monkeypatch.setattr(tuned, "table", lambda: found)
        tuned._cached_entry.cache_clear()

    yield replace
    monkeypatch.undo()
    tuned._cached_entry.cache_clear()


def test_the_committed_table_serves_every_layer():
    for dtype in tuned.DTYPES.values():
        for head_dim, keys in ((40, 77), (64, 77), (160, 77), (64, 128), (12, 1)):
            facts = {**LAYER, "dtype": dtype, "head_dim": head_dim, "keys": keys}
            config = tuned.launch("attend", CPU, **facts)
            assert set(config) - {"widest"} == {"block", "num_warps", "num_stages"}
    assert tuned.launch("attend", CPU, **LAYER)["block"] == 64
    assert tuned.launch("attend", CPU, **{**LAYER, "head_dim": 160})["block"] == 64
    assert tuned.launch("attend", CPU, **{**LAYER, "head_dim": 160, "keys": 128})["block"] == 16
    assert tuned.launch("attend", CPU, **{**LAYER, "dtype": "fp32"})["block"] == 16


def test_every_default_ends_with_an_entry_for_all():
    for kernels in (json.loads(tuned.FILE.read_text())["*"],):
        assert all(entries[-1]["when"] == {} for entries in kernels.values())


def test_a_device_comes_before_its_architecture_and_that_before_all_others():
    table = {
        "*": {"f": [{"when": {}, "launch": {"block": 1}}]},
        "H": {"f": [{"when": {"n": [2, 4]}, "launch": {"block": 2}}, {"when": {"n": 5}, "launch": {"block": 3}}]},
        "sm_90": {"f": [{"when": {"n": [4, 6]}, "launch": {"block": 4}}]},
    }
    found = {n: tuned.find(table, "f", ("H", "sm_90"), {"n": n})["launch"]["block"] for n in range(1, 8)}
    assert found == {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 4, 7: 1}
    assert tuned.find(table, "f", ("other", "sm_90"), {"n": 5})["launch"]["block"] == 4
    assert tuned.find(table, "f", ("other", "sm_80"), {"n": 5})["launch"]["block"] == 1


def test_a_gpu_has_a_name_and_an_architecture():
    with stand_in():
        assert tuned.names(torch.device("cuda")) == ("stand-in", "sm_90")
    assert tuned.names(CPU) == ("cpu",)


def test_a_configuration_is_the_callers_own():
    tuned.launch("attend", CPU, **LAYER).clear()
    assert tuned.launch("attend", CPU, **LAYER)


def test_triton_runs_only_where_the_table_says_so(entries):
    assert tuned.impl("attend", CPU, **LAYER) == "torch"
    entries({"cpu": {"attend": [{"when": {"pixels": 4096}, "launch": {}, "impl": "triton"}]}, **tuned.table()})
    assert tuned.impl("attend", CPU, **LAYER) == "triton"
    assert tuned.impl("attend", CPU, **{**LAYER, "pixels": 1024}) == "torch"


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA: what `auto` would choose there."""

    is_cuda = True


@pytest.mark.parametrize(
    ("pixels", "keys", "mask", "impl"),
    [
        (64, 77, None, "triton"),
        (100, 77, None, "sdpa"),
        (64, 129, None, "sdpa"),
        (64, 77, torch.zeros(1, 1, 1, 77), "sdpa"),
    ],
    ids=["measured faster", "unknown layer", "too many keys", "masked"],
)
def test_auto_on_cuda_is_what_was_measured_to_be_faster(entries, monkeypatch, pixels, keys, mask, impl):
    entries({"cpu": {"attend": [{"when": {"pixels": 64}, "launch": {}, "impl": "triton"}]}, **tuned.table()})
    module = importlib.import_module("diffumask_fast.kernels.attend")
    monkeypatch.setattr(module, "_triton", lambda q, *rest: (q, "the kernel's"))
    q, k = (torch.randn(1, n, 16).as_subclass(OnCuda) for n in (pixels, keys))
    with ran() as impls:
        _, maps = attend(q, k, k, torch.rand(1, keys, 1), heads=1, mask=mask)
    assert impls == [("attend", impl)] and (maps == "the kernel's") == (impl == "triton")


def test_an_export_on_cuda_holds_torch_whatever_was_measured(entries, monkeypatch):
    faster = [{"when": {}, "launch": {}, "impl": "triton"}]
    entries({"cpu": {"attend": faster, "guided_filter": faster}, **tuned.table()})
    for name in ("attend", "guided_filter"):
        module = importlib.import_module(f"diffumask_fast.kernels.{name}")
        monkeypatch.setattr(module, "_triton", lambda q, *rest: (q, None))
    x, image = torch.randn(1, 8, 16).as_subclass(OnCuda), torch.rand(1, 3, 6, 6).as_subclass(OnCuda)
    for exporting in (False, True):
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda exporting=exporting: exporting)
        with ran() as impls:
            attend(x, x, x, torch.rand(1, 8, 1), heads=1)
            guided_filter(image, image, 1, 1e-3)
        wanted = ("sdpa", "torch") if exporting else ("triton", "triton")
        assert tuple(impl for _, impl in impls) == wanted


def test_the_choice_is_a_constant_of_a_compiled_graph():
    def choose(x):
        facts = {"dtype": "fp16", "heads": 8, "head_dim": 40, "pixels": x.shape[1], "keys": 77}
        return x + 1 if tuned.impl("attend", x.device, **facts) == "torch" else x

    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1, 4)), torch.ones(1, 4))
