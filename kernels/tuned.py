"""Launch configurations as data: `tuned.json`, read here, written by `diffumask-fast tune`.

The file maps a device's name, an architecture ("sm_90") or "*" to kernels, and a kernel to entries in order:
`{"when": {"head_dim": 64, "keys": [1, 96]}, "launch": {"block": 64, ...}, "impl": "triton"}`. The first entry whose
conditions all hold is taken, those of the device's own name before its architecture's, "*" last; a pair of numbers
means from .. to. "impl" is the implementation that was measured to be the fastest; without it, torch's is taken.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuned.json")
Table = dict[str, dict[str, list[dict[str, Any]]]]
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@functools.cache
def table() -> Table:
    """Return what `tuned.json` holds, read once."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def forget() -> None:
    """Read the table again at the next look-up: the file was replaced."""
    table.cache_clear()
    _cached_entry.cache_clear()


def find(table: Table, kernel: str, names: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Return a kernel's first entry whose conditions hold; entries of the first name come first, those of "*" last.

    Example:
        >>> find({"*": {"f": [{"when": {"n": [1, 8]}, "launch": {"block": 16}}]}}, "f", ["sm_90"], {"n": 4})["launch"]
        {'block': 16}
    """
    candidates = (entry for name in (*names, "*") for entry in table.get(name, {}).get(kernel, ()))
    return next(entry for entry in candidates if _holds(entry["when"], facts))


def names(device: torch.device) -> tuple[str, ...]:
    """Return the table's names of a device: a GPU's own and its architecture's, such as "sm_90"."""
    if device.type != "cuda":
        return (device.type,)
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def _holds(when: dict[str, Any], facts: dict[str, Any]) -> bool:
    def fits(wanted: Any, fact: Any) -> bool:
        return wanted[0] <= fact <= wanted[1] if isinstance(wanted, list) else wanted == fact

    return all(fits(wanted, facts[name]) for name, wanted in when.items())


def _entry(kernel: str, device: torch.device, facts: dict[str, Any]) -> dict[str, Any]:
    # a traced size becomes a number here: a configuration is chosen once for a graph
    fixed = ((name, fact if isinstance(fact, str) else int(fact)) for name, fact in facts.items())
    return _cached_entry(kernel, device, tuple(fixed))


@functools.cache
def _cached_entry(kernel: str, device: torch.device, facts: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return find(table(), kernel, names(device), dict(facts))


def launch(kernel: str, device: torch.device, **facts: Any) -> dict[str, int]:
    """Return the launch configuration of a kernel: a function of the facts, which never include the batch."""
    return dict(_entry(kernel, device, facts)["launch"])


@torch.compiler.assume_constant_result
def impl(kernel: str, device: torch.device, **facts: Any) -> str:
    """Return the implementation that was measured to be the fastest here: "triton", "sdpa+maps" or else "torch"."""
    return _entry(kernel, device, facts).get("impl", "torch")
