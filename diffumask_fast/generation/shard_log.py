"""What the log says of a shard."""

from __future__ import annotations

import logging
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffumask_fast.pipeline import DiffuMaskPipeline

if TYPE_CHECKING:
    from diffumask_fast.generation.cluster import Cluster

logger = logging.getLogger("diffumask_fast")


class ShardLog:
    """Tell the logger of each shard that is written: rows, accepted ones, seconds by stage, memory, retries.

    Args:
        pipe: what draws them.
    """

    def __init__(self, pipe: DiffuMaskPipeline | Cluster) -> None:
        self._pipe, self._before = pipe, pipe.seconds.as_dict()
        self._retries = 0
        self._drawn: dict[int, dict[str, Any]] = {}

    def retried(self) -> None:
        """Count that the shard at hand is drawn anew."""
        self._retries += 1

    def drawn(self, index: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the figures of a shard that is drawn; its seconds are those since the one before."""
        now = self._pipe.seconds.as_dict()
        self._drawn[index] = {
            "shard": index, "rows": len(rows), "accepted": sum(row["accepted"] for row in rows),
            "seconds": {stage: round(value - self._before[stage], 3) for stage, value in now.items()},
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_peak_bytes": self._device_peak(), "retries": self._retries,
        }  # fmt: skip
        self._before, self._retries = now, 0

    def written(self, index: int, seconds: float) -> None:
        """Tell of a shard that is written.

        Args:
            index: of the shard.
            seconds: that the writing took, beside the drawing.
        """
        figures = self._drawn.pop(index)
        figures["seconds"]["write"] = round(seconds, 3)
        logger.info("shard %d written, %d images", index, figures["rows"], extra={"figures": figures})

    def _device_peak(self) -> int | None:
        """Return the most bytes that tensors took on the GPU since the last call; None on a CPU."""
        device = self._pipe.device
        if device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
