"""The embedded text-to-image model and the composed world that it is trained on."""

from pathlib import Path


def folder() -> Path:
    """Return the diffusers folder of the embedded model."""
    return Path(__file__).parent / "weights"
