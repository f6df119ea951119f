"""Load a folder's components one by one, and refuse those whose files do not hold what their configuration asks for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, pipelines
from transformers import PreTrainedModel

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline

SENTENCE = "a photo of a dog on the grass"
NAMED = 3  # tensors of a kind that an error names


def load_models(folder: Path, dtype: torch.dtype, held: Collection[str] = ()) -> dict[str, torch.nn.Module]:
    """Load each model that a diffusers folder names, and check that its weights are all there and no others.

    Components of other libraries than diffusers and transformers are left to diffusers.

    Args:
        folder: a checked diffusers folder.
        dtype: of the weights.
        held: components that come from elsewhere.

    Returns:
        name of the component -> model.

    Raises:
        DiffuMaskError: naming tensors that a file lacks, that no layer takes, or that have another shape.
    """
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    kinds = {name: _kind_of(value) for name, value in index.items() if name not in held}
    return {name: _load(kind, folder / name, dtype) for name, kind in kinds.items() if kind is not None}


def _kind_of(value: Any) -> type | None:
    """Return the class of an entry of model_index.json if it is a model, else None."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
        return None
    library, name = value
    known = library in ("diffusers", "transformers")
    home = importlib.import_module(library) if known else getattr(pipelines, library, None)
    kind = getattr(home, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel) else None


def _load(kind: Any, part: Path, dtype: torch.dtype) -> torch.nn.Module:
    model, report = kind.from_pretrained(
        str(part), torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
        # so that the report names them; they are refused below
        ignore_mismatched_sizes=True, variant=_variant(part),
    )  # fmt: skip
    faults = [
        (report["missing_keys"], "lacks"),
        (report["unexpected_keys"], "holds, beyond what config.json asks for,"),
        ([key[0] for key in report["mismatched_keys"]], "has other shapes than config.json asks for in"),
    ]
    told = [f"{words} {_some(keys)}" for keys, words in faults if keys]
    if told:
        raise DiffuMaskError(f"{part} {' and '.join(told)}: fetch the model again.")
    return model


def _variant(part: Path) -> str | None:
    """Return "fp16" for a component whose weights come only as *.fp16.safetensors."""
    names = [path.name for path in part.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _some(keys: Collection[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def try_tokenizers(pipe: DiffusersPipeline, folder: Path) -> None:
    """Encode a sentence with each tokenizer of a pipeline, and compare what comes out with the text encoder beside it.

    Raises:
        DiffuMaskError: no words are known, prompts have no length, or an id is none of the text encoder's.
    """
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer, encoder = (getattr(pipe, part, None) for part in (name, name.replace("tokenizer", "text_encoder")))
        if tokenizer is None:
            continue
        ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
        if not ids or all(i == tokenizer.unk_token_id for i in ids):
            raise DiffuMaskError(f"{folder / name} knows no word of {SENTENCE!r}: fetch the model again.")
        config = getattr(encoder, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and tokenizer.model_max_length > most:
            raise DiffuMaskError(
                f"{folder / name} has no model_max_length up to {most}, the positions of its text encoder: put it into "
                "tokenizer_config.json, or fetch the model again."
            )
        size = getattr(config, "vocab_size", None)
        if size is not None and max(*ids, len(tokenizer) - 1) >= size:
            raise DiffuMaskError(
                f"{folder / name} has {len(tokenizer)} tokens and its text encoder knows {size}: the two are of "
                "different models, fetch the model again."
            )
