"""The heavy lines: attention with value columns and the guided filter."""

from diffumask_fast.kernels.attend import attend, cross_attention_maps

__all__ = ["attend", "cross_attention_maps"]
