"""Where words look: maps out of the attention of a running diffusers pipeline."""

from diffumask_fast.attention.collect import Collector, collect_maps
from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.attention.processor import MapProcessor
from diffumask_fast.attention.store import MapStore
from diffumask_fast.attention.tap import Levels, Tap
from diffumask_fast.attention.unet import UNetWithMaps

__all__ = [
    "Collector",
    "Levels",
    "MapProcessor",
    "MapStore",
    "PhraseNotFound",
    "Tap",
    "UNetWithMaps",
    "collect_maps",
    "phrase_columns",
]
