"""The heavy lines: attention with value columns and the guided filter."""

from diffumask_fast.kernels.attend import attend, cross_attention_maps
from diffumask_fast.kernels.guided_filter import guided_filter
from diffumask_fast.kernels.record import ran

__all__ = ["attend", "cross_attention_maps", "guided_filter", "ran"]
