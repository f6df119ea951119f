"""Text in; images with pixel-accurate semantic masks out, at the speed of the diffusion model alone."""

import importlib

__version__ = "0.1.0"
__all__ = [
    "DiffuMaskError",
    "DiffuMaskPipeline",
    "MapOptions",
    "MaskOptions",
    "Vocabulary",
    "__version__",
    "collect_maps",
]

_HOMES = {
    "DiffuMaskError": "diffumask_fast.errors",
    "DiffuMaskPipeline": "diffumask_fast.pipeline",
    "MapOptions": "diffumask_fast.attention.options",
    "MaskOptions": "diffumask_fast.masks.options",
    "Vocabulary": "diffumask_fast.prompts.vocabulary",
    "collect_maps": "diffumask_fast.attention.collect",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import diffumask_fast` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
