"""Captions as vectors, by the text encoder of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.pipeline import DiffuMaskPipeline

BATCH = 128  # captions that are encoded at once
ENCODERS = (("text_encoder_2", "tokenizer_2"), ("text_encoder", "tokenizer"))


def compares_texts(pipe: DiffuMaskPipeline) -> bool:
    """Tell whether a pipeline has an encoder whose vector of a text was trained to be compared: CLIP's, with layers."""
    encoder, _ = _encoder(pipe.pipe)
    return _is_clip(encoder) and encoder.config.num_hidden_layers > 0


def embed(pipe: DiffuMaskPipeline, texts: Sequence[str]) -> np.ndarray:
    """Return a vector of length 1 for each text.

    It is CLIP's projected vector where the encoder has one, else the state at CLIP's end token; of other encoders the
    mean of the states at the text's own tokens.

    Args:
        pipe: whose text encoder is used.
        texts: n of them, cut off to the tokenizer's length.

    Returns:
        [n, D] fp16.

    Raises:
        DiffuMaskError: a vector has entries that are no numbers.
    """
    encoder, tokenizer = _encoder(pipe.pipe)
    # an exported encoder has one length, and a largest batch
    size, padding = (BATCH, "longest") if pipe.engine is None else (pipe.engine.limits.batch, "max_length")
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    rows: np.ndarray | None = None
    for part in parts:
        tokens = tokenizer(
            [texts[number] for number in part], padding=padding, truncation=True, return_tensors="pt",
            max_length=tokenizer.model_max_length, return_attention_mask=True,
        )  # fmt: skip
        vectors = _vectors(encoder, tokenizer, tokens["input_ids"], tokens["attention_mask"])
        if rows is None:
            rows = np.empty((len(texts), vectors.shape[1]), np.float16)
        rows[part] = vectors.cpu().numpy()
    if rows is not None and not np.isfinite(rows).all():
        raise DiffuMaskError(
            "the text encoder gives captions vectors that are no numbers: say `dtype=fp32` or `retrieval=words`"
        )
    return np.empty((0, 0), np.float16) if rows is None else rows


@torch.inference_mode()
def _vectors(encoder: Any, tokenizer: Any, ids: Tensor, mask: Tensor) -> Tensor:
    device = encoder.device
    is_clip = _is_clip(encoder)
    # CLIP's states do not depend on what comes after them; diffusers gives it no mask either
    out = encoder(ids.to(device)) if is_clip else encoder(ids.to(device), attention_mask=mask.to(device))
    vectors = getattr(out, "text_embeds", None)
    if vectors is None and is_clip and encoder.config.num_hidden_layers > 0:
        vectors = out.pooler_output
    if vectors is None:
        own = mask.bool() & ~torch.isin(ids, torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=ids.dtype))
        own = torch.where(own.any(1, keepdim=True), own, mask.bool()).to(device)[..., None]
        vectors = (out.last_hidden_state.float() * own).sum(1) / own.sum(1)
    return torch.nn.functional.normalize(vectors.float(), dim=1).half()


def _encoder(pipe: Any) -> tuple[Any, Any]:
    """Return the text encoder with a projection, if there is one, else the first, and its tokenizer."""
    pairs = [(getattr(pipe, encoder, None), getattr(pipe, tokenizer, None)) for encoder, tokenizer in ENCODERS]
    pairs = [pair for pair in pairs if None not in pair]
    return next((pair for pair in pairs if hasattr(pair[0], "text_projection")), pairs[-1])


def _is_clip(encoder: Any) -> bool:
    return str(getattr(encoder.config, "model_type", "")).startswith("clip")
