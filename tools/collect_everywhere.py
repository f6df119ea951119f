"""A pytest plugin for diffusers' own tests: every call of a pipeline there collects maps.

`pytest -p collect_everywhere --images FILE` writes a hash of what each call gave, one JSON object for each test;
`--plain` does the same without collecting. Both must give the same hashes.
"""

import functools
import hashlib
import json
import re
from collections import defaultdict
from contextlib import ExitStack

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from diffumask_fast import collect_maps
from diffumask_fast.attention.families import family_of
from diffumask_fast.errors import DiffuMaskError

WORD = re.compile(r"[a-z]+", re.IGNORECASE)


def pytest_addoption(parser):
    """Take the options of this plugin."""
    parser.addoption("--images", required=True)
    parser.addoption("--plain", action="store_true")


def pytest_configure(config):
    """Wrap the call of every pipeline of diffusers."""
    config.pluginmanager.register(Calls(config.getoption("images"), config.getoption("plain")))


class Calls:
    """What was drawn in each test."""

    def __init__(self, path, plain):
        self.path, self.plain = path, plain
        self.seen = defaultdict(list)
        self.test, self.depth = "", 0
        names = (name for name in dir(diffusers) if name.endswith("Pipeline"))
        pipelines = [getattr(diffusers, name) for name in names]
        for kind in {base for pipeline in pipelines if isinstance(pipeline, type) for base in pipeline.__mro__}:
            if "__call__" in vars(kind) and issubclass(kind, diffusers.DiffusionPipeline):
                kind.__call__ = self.wrapped(kind.__call__)

    def wrapped(self, call):
        """Return a pipeline's call that collects."""

        @functools.wraps(call)
        def collecting(pipe, *args, **kwargs):
            if self.depth:
                return call(pipe, *args, **kwargs)
            self.depth += 1
            try:
                with ExitStack() as stack:
                    maps = None if self.plain else self.collect(pipe, args, kwargs, stack)
                    result = call(pipe, *args, **kwargs)
            finally:
                self.depth -= 1
            self.seen[self.test].append({"pipe": type(pipe).__name__, "output": digest(result), "maps": bool(maps)})
            return result

        return collecting

    def collect(self, pipe, args, kwargs, stack):
        """Begin to collect the maps of the first word of each prompt, or of the token after the first."""
        try:
            family_of(pipe)
        except DiffuMaskError:
            return None
        prompt = kwargs.get("prompt", args[0] if args else None)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = [WORD.findall(text)[:1] for text in prompts or [] if isinstance(text, str)]
        phrases = words if words and all(words) else ["first"]
        indices = None if phrases is words else [[1]]
        return stack.enter_context(collect_maps(pipe, phrases, token_indices=indices))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Note which test runs."""
        self.test = item.nodeid
        return (yield)

    def pytest_sessionfinish(self):
        """Write what was seen."""
        with open(self.path, "w") as file:
            json.dump(self.seen, file, indent=1)


def digest(result):
    """Return a hash of all arrays, tensors and pictures of an output."""
    found = hashlib.sha256()
    values = result.values() if hasattr(result, "values") else result
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().float().cpu().numpy()
        if isinstance(leaf, np.ndarray) or hasattr(leaf, "tobytes"):
            found.update(leaf.tobytes())
    return found.hexdigest()
