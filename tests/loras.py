"""LoRA files of a tiny model, of random weights that are large enough to be seen."""

from pathlib import Path

import torch
from safetensors.torch import save_file

OF_UNET = ("to_q", "to_k", "to_v", "to_out.0")
OF_ENCODER = ("q_proj", "v_proj")


def tensors(model: torch.nn.Module, prefix: str, ends: tuple[str, ...], rank: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in model.named_modules():
        if name.endswith(ends) and isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            found[f"{prefix}.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            found[f"{prefix}.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 4
    return found


def write_lora(path: Path, pipe, *, unet=True, encoder=False, rank: int = 4, seed: int = 0) -> Path:
    """Write a LoRA of a pipeline's UNet, of its text encoder, or of both."""
    parts = tensors(pipe.unet, "unet", OF_UNET, rank, seed) if unet else {}
    if encoder:
        parts |= tensors(pipe.text_encoder, "text_encoder", OF_ENCODER, rank, seed + 1)
    save_file(parts, path, metadata={"format": "pt"})
    return path
