"""Load a folder's components one by one, and refuse those whose weights do not match their configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, pipelines
from transformers import PreTrainedModel

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline

SENTENCE = "a photo of a dog on the grass"
MAX_NAMED = 3  # tensors that an error names, of each fault


def load_models(folder: Path, dtype: torch.dtype, held: Collection[str] = ()) -> dict[str, torch.nn.Module]:
    """Load each model that a diffusers folder names, and check that no weights are missing or unexpected.

    Components of other libraries than diffusers and transformers are left to diffusers.

    Args:
        folder: a checked diffusers folder.
        dtype: of the weights.
        held: names of the components to leave out, because they come from elsewhere.

    Returns:
        name of the component -> model.

    Raises:
        DiffuMaskError: tensors are missing, unexpected or of a wrong shape; names some of them.
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
    module = importlib.import_module(library) if known else getattr(pipelines, library, None)
    kind = getattr(module, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel) else None


def _load(kind: Any, part: Path, dtype: torch.dtype) -> torch.nn.Module:
    model, report = kind.from_pretrained(
        str(part), **as_argument(dtype, kind), use_safetensors=True, local_files_only=True, output_loading_info=True,
        # so that they are reported, and refused below
        ignore_mismatched_sizes=True, variant=_variant(part),
    )  # fmt: skip
    faults = [
        (report["missing_keys"], "lacks"),
        (report["unexpected_keys"], "holds, beyond what config.json asks for,"),
        ([key[0] for key in report["mismatched_keys"]], "has other shapes than config.json asks for in"),
    ]
    clauses = [f"{words} {_first_names(keys)}" for keys, words in faults if keys]
    if clauses:
        raise DiffuMaskError(f"{part} {' and '.join(clauses)}: fetch the model again.")
    return model


def as_argument(dtype: torch.dtype, kind: Any = ModelMixin) -> dict[str, torch.dtype]:
    """Return a dtype as `from_pretrained` takes it: the name before 0.42 is deprecated in later diffusers."""
    earlier = issubclass(kind, ModelMixin) and tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42)
    return {"torch_dtype" if earlier else "dtype": dtype}


def _variant(part: Path) -> str | None:
    """Return "fp16" for a component whose weights come only as *.fp16.safetensors."""
    names = [path.name for path in part.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _first_names(keys: Collection[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


def try_tokenizers(pipe: DiffusersPipeline, folder: Path) -> None:
    """Encode a sentence with each tokenizer of a pipeline, and check that its text encoder takes the result.

    Raises:
        DiffuMaskError: a tokenizer knows no word of it, has no maximum length, or has more tokens than its encoder.
    """
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer, encoder = (getattr(pipe, part, None) for part in (name, name.replace("tokenizer", "text_encoder")))
        if tokenizer is None:
            continue
        ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
        if not ids or all(i == tokenizer.unk_token_id for i in ids):
            raise DiffuMaskError(f"{folder / name} knows no word of {SENTENCE!r}: fetch the model again.")
        config = getattr(encoder, "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and tokenizer.model_max_length > positions:
            raise DiffuMaskError(
                f"{folder / name} has no model_max_length up to {positions}, the positions of its text encoder: put it "
                "into tokenizer_config.json, or fetch the model again."
            )
        vocab_size = getattr(config, "vocab_size", None)
        if vocab_size is not None and max(*ids, len(tokenizer) - 1) >= vocab_size:
            raise DiffuMaskError(
                f"{folder / name} has {len(tokenizer)} tokens and its text encoder knows {vocab_size}: the two are of "
                "different models, fetch the model again."
            )
