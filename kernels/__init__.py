"""The costly operations: attention with value columns, the guided filter and the mean-field step."""

from diffumask_fast.kernels.attend import attend, cross_attention_maps
from diffumask_fast.kernels.guided_filter import GuidedFilter, guided_filter
from diffumask_fast.kernels.mean_field import bilateral_norm, mean_field
from diffumask_fast.kernels.record import ran
from diffumask_fast.kernels.source import source_hash

__all__ = [
    "GuidedFilter", "attend", "bilateral_norm", "cross_attention_maps", "guided_filter", "mean_field", "ran",
    "source_hash",
]  # fmt: skip
