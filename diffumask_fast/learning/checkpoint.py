"""The state of a training in one safetensors file, which is there whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffumask_fast.dataset.folder import differences
from diffumask_fast.dataset.writer import temporary_path, write_file
from diffumask_fast.errors import DiffuMaskError

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class State:
    """What a step changes.

    Args:
        model: learns.
        average: of its weights so far.
        adam: its optimizer.
        stage: which data it learns from.
        step: steps of this stage that are taken.
        loss: smoothed; None before the first step.
    """

    model: nn.Module
    average: nn.Module
    adam: torch.optim.AdamW
    stage: int = 0
    step: int = 0
    loss: float | None = None


def write_checkpoint(folder: Path, state: State, plan: dict[str, Any]) -> None:
    """Keep a state, in place of the one before.

    Args:
        folder: of the segmenter.
        state: of the training.
        plan: what the state is a state of.

    Raises:
        DiffuMaskError: it cannot be written; the one before is still there.
    """
    parts = {"model": state.model.state_dict(), "average": state.average.state_dict()}
    parts |= {f"adam.{number}": values for number, values in state.adam.state_dict()["state"].items()}
    tensors = {f"{part}/{name}": _kept(tensor) for part, values in parts.items() for name, tensor in values.items()}
    place = {"stage": state.stage, "step": state.step, "loss": state.loss, "plan": plan}
    write_file(folder / CHECKPOINT, save(tensors, {"state": json.dumps(place)}))


def read_checkpoint(folder: Path, state: State, plan: dict[str, Any]) -> None:
    """Bring a state to where the last checkpoint was; without one it stays as it is.

    Raises:
        DiffuMaskError: the checkpoint is damaged, or of a training with other options.
    """
    path = folder / CHECKPOINT
    temporary_path(path).unlink(missing_ok=True)
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as stored:
            place = json.loads(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        check_same(folder, place["plan"], plan)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        state.model.load_state_dict(parts.pop("model"))
        state.average.load_state_dict(parts.pop("average"))
        moments = {int(part.removeprefix("adam.")): values for part, values in parts.items()}
        state.adam.load_state_dict({"state": moments, "param_groups": state.adam.state_dict()["param_groups"]})
        state.stage, state.step, state.loss = place["stage"], place["step"], place["loss"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DiffuMaskError(f"{path} is damaged: remove it, and the training begins anew") from error


def check_same(folder: Path, there: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise where a folder holds another training."""
    changes = [f"`{name}` {change}" for name, change in differences(there, plan)]
    if changes:
        raise DiffuMaskError(f"{folder} holds a training with other options: {', '.join(changes)}; use another folder")


def clear(folder: Path) -> None:
    """Remove the checkpoint of a training that is finished."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
