"""Which implementation computes attention where no maps are made: torch's own, or xformers."""

from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_processor import XFormersAttnProcessor

from diffumask_fast.errors import DiffuMaskError, in_one_line

ATTENTIONS = ("sdpa", "xformers")
INSTEAD = "use `attention=sdpa`"


def check_attention(attention: str, engine: str, device: torch.device) -> None:
    """Refuse an attention that is not available here, before a model is loaded.

    Raises:
        DiffuMaskError: there is no such attention; the engine or the device cannot use xformers; it is not installed.
    """
    if attention not in ATTENTIONS:
        raise DiffuMaskError(f"There is no attention {attention}: use {' or '.join(ATTENTIONS)}.")
    if attention == "sdpa":
        return
    if engine != "torch":
        raise DiffuMaskError(f"`engine={engine}` has an attention of its own: {INSTEAD}, or `engine=torch`.")
    if device.type != "cuda":
        raise DiffuMaskError(f"xformers runs on CUDA alone, and the device is {device}: {INSTEAD}.")
    if find_spec("xformers") is None:
        raise DiffuMaskError(f"xformers is not installed: pip install 'diffumask-fast[gpu]', or {INSTEAD}.")


def set_attention(unet: Any, attention: str) -> None:
    """Let xformers compute the attention of a UNet's layers; "sdpa" leaves them as they are.

    Raises:
        DiffuMaskError: xformers is installed and does not work.
    """
    if attention == "sdpa":
        return
    try:
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # it computes a first product, and its errors have no common base
        cause = in_one_line(error)
        raise DiffuMaskError(f"xformers does not work here ({cause}): {INSTEAD}.") from error


def attention_of(unet: Any) -> str:
    """Return "xformers" where it computes the attention of any layer of a UNet, else "sdpa"."""
    processors = unet.attn_processors.values()
    return "xformers" if any(type(one) is XFormersAttnProcessor for one in processors) else "sdpa"
