"""The paper's program's map of a class: which tokens count, which levels, and how they become one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.attention.store import over_maximum
from diffumask_fast.prompts.vocabulary import Vocabulary

SIDE = 512
# The words whose tokens count for a class; its name where nothing is listed.
WORDS = {
    "aeroplane": ("aerop", "lane"),
    "diningtable": ("table",),
    "person": ("arm", "person", "man", "woman", "child", "boy", "girl", "teenager"),
    "pottedplant": ("pot", "ted", "plant"),
    "tvmonitor": ("tv", "monitor"),
}
COARSEST_ALONE = ("sofa", "train", "tvmonitor")


def word_tokens(tokenizer: Any, prompt: str) -> dict[int, list[int]]:
    """Find the tokens of every VOC class in a prompt.

    A token counts when it, decoded alone, is one of the class's words (that program's rule). Where none does, the
    tokens of the class's phrase count, for tokenizers that split words elsewhere than CLIP's.

    Args:
        tokenizer: of the pipeline; only tokens that its text encoder reads are looked at.
        prompt: the text.

    Returns:
        class index 0 to 19 -> positions, the start token being 0; only classes that are there.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=True, max_length=length)["input_ids"]
    texts = [tokenizer.decode([token]).strip() for token in ids]
    tokens = {}
    for entry in Vocabulary.voc().entries:
        words = WORDS.get(entry.name, (entry.name,))
        positions = [i for i, text in enumerate(texts) if text in words]
        if not positions:
            try:
                columns = phrase_columns(tokenizer, [prompt], [[entry.phrase]], length=length)
            except PhraseNotFound:
                continue
            positions = columns[0, :, 0].nonzero().flatten().tolist()
        tokens[entry.id - 1] = positions
    return tokens


def class_levels(class_name: str, keys: Sequence[str]) -> list[str]:
    """Choose the levels that make up a class's map.

    Counted from the coarsest, so that SD 1.x at 512 pixels has that program's 64, 32 and 16 (sofa, train, tvmonitor:
    the 8 alone; diningtable: the 16 alone), and mini's 16, 8 and 4 become 16 and 8 (the 4; the 8).

    Args:
        class_name: one of VOC's.
        keys: of the levels, "0" the finest.

    Example:
        >>> class_levels("dog", ["0", "1", "2", "3"]), class_levels("sofa", ["0", "1", "2", "3"])
        (['0', '1', '2'], ['3'])
    """
    keys = sorted(keys, key=int)
    if class_name in COARSEST_ALONE:
        return keys[-1:]
    if class_name == "diningtable":
        return keys[-2:][:1]
    return keys[:-1] or keys


def fuse(levels: Sequence[Tensor]) -> Tensor:
    """Make one map [512, 512] fp32 of a class's levels, each [n, h, w] for its n tokens.

    Every map is enlarged and divided by its maximum, then all are averaged: at most 1, and slightly negative where the
    bicubic kernel overshoots.
    """
    enlarged = [F.interpolate(maps[None], (SIDE, SIDE), mode="bicubic", align_corners=False)[0] for maps in levels]
    return torch.stack([over_maximum(maps.flatten(1)) for maps in enlarged]).mean((0, 1)).view(SIDE, SIDE)
