import os

import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from diffumask_fast.borrow import VARIANTS, many_shapes
from diffumask_fast.engines.inductor import CODE_FOLDER, inductor
from diffumask_fast.kernels import source_hash
from diffumask_fast.models.cache import cache_folder


def compiled_once(factor):
    function = torch.compile(lambda x: (x * factor).sin(), dynamic=False, fullgraph=True, backend=inductor)
    assert torch.allclose(function(torch.ones(5)), torch.tensor(factor).sin())


def test_code_is_kept_for_the_state_of_the_kernels_and_the_environment_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CODE_FOLDER, raising=False)
    folder = cache_folder() / "inductor" / source_hash()
    assert not folder.exists()
    compiled_once(2.125)
    assert list(folder.rglob("*.cpp")) and folder.is_relative_to(tmp_path)
    assert os.environ.get(CODE_FOLDER) in (None, default_cache_dir())  # which torch sets


def test_a_folder_that_is_set_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv(CODE_FOLDER, str(tmp_path / "own"))
    compiled_once(3.125)
    assert list((tmp_path / "own").rglob("*.cpp")) and os.environ[CODE_FOLDER] == str(tmp_path / "own")


def test_more_shapes_than_torch_allows_by_itself():
    limit = torch._dynamo.config.recompile_limit
    function = torch.compile(lambda x: x + 1, dynamic=False, fullgraph=True, backend="eager")
    counters.clear()
    with many_shapes():
        assert torch._dynamo.config.recompile_limit == VARIANTS
        for size in range(2, limit + 4):
            function(torch.zeros(size))
    assert counters["stats"]["unique_graphs"] == limit + 2 and torch._dynamo.config.recompile_limit == limit
