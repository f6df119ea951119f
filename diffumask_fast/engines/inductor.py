"""Compile with torch's inductor without changing the process's settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from diffumask_fast.borrow import patched_environment
from diffumask_fast.kernels import source_hash
from diffumask_fast.models.cache import cache_folder

CODE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def inductor(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """Compile a graph: a backend of torch.compile that caches its code on disk for later runs.

    The cache is TORCHINDUCTOR_CACHE_DIR where that is set, else a folder in `~/.cache/diffumask-fast/inductor` named
    after the hash of the kernels' sources, which torch's own cache keys leave out. Torch compiles one graph at a time,
    so no other compilation sees the changed variable.
    """
    with patched_environment(CODE_FOLDER, _code_folder()):
        return torch._dynamo.lookup_backend("inductor")(graph, inputs, **options)


def _code_folder() -> str:
    # torch itself sets the variable to its own default, as soon as dynamo is imported
    given = os.environ.get(CODE_FOLDER)
    if given and given != default_cache_dir():
        return given
    return str(cache_folder() / "inductor" / source_hash())
