"""A pytest plugin for diffusers' own tests: every call of a pipeline there collects maps.

`pytest -p collect_everywhere --plain --images FILE.npz TESTS` keeps what each call gave, without collecting; the same
without `--plain` collects, and tells how far from that it is. Heads of 2 to 8 dimensions, as these tests have them, are
equal up to rounding alone.
"""

import functools
import re
from collections import defaultdict
from contextlib import ExitStack

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
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
        self.collected = self.depth = 0
        self.test = ""
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
            self.seen[self.test].append(pixels(result))
            self.collected += maps is not None
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
        """Note which test runs, without its folder: that is relative to what else is on the command line."""
        self.test = "::".join([item.path.name, *item.nodeid.split("::")[1:]])
        return (yield)

    def pytest_terminal_summary(self, terminalreporter):
        """Keep the images, or tell how far they are from those that were kept."""
        now = {f"{test} {at}": image for test, images in self.seen.items() for at, image in enumerate(images)}
        if self.plain:
            np.savez(self.path, **now)
            return
        with np.load(self.path) as kept:
            apart = {name: np.abs(kept[name] - now[name]).max(initial=0) for name in kept.files if name in now}
            told = (
                f"{len(now)} calls, {self.collected} with maps; {len(apart)} of {len(kept.files)} plain ones compared"
            )
        equal = sum(one == 0 for one in apart.values())
        worst, most = max(apart.items(), key=lambda one: one[1], default=("none", 0))
        terminalreporter.write_line(f"{told}: {equal} equal, the others at most {most:.1e} apart ({worst})")


def pixels(result):
    """Return all numbers of an output."""
    values = result.values() if hasattr(result, "values") else result
    found = [np.zeros(0)]
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().float().cpu().numpy()
        if isinstance(leaf, np.ndarray):
            found.append(leaf.ravel())
        elif isinstance(leaf, Image.Image):
            found.append(np.asarray(leaf).ravel() / 255)
    return np.concatenate(found).astype(np.float32)
