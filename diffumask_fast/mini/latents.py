"""Compose and encode scenes of the world for training, and keep their latents in a file.

    python -m diffumask_fast.mini.latents FOLDER/0.safetensors --vae OUT/vae --num 8000 --first 0

All runs of `mini.train --latents FOLDER` with this VAE can read a folder of such files (2.5 KB a scene), on any
machine. Several processes can fill the folder at the same time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffumask_fast.mini.tokenizer import write_tokenizer
from diffumask_fast.mini.world import World, load_sprites


def compose(world: World, seed: int, first: int, num: int) -> tuple[Tensor, Tensor, list[str]]:
    """Compose scenes first .. first + num of a world: images uint8 [B, 3, H, W], masks uint8 [B, H, W], prompts."""
    scenes = [world.scene(seed, index) for index in range(first, first + num)]
    images = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).permute(0, 3, 1, 2).contiguous()
    masks = torch.stack([torch.from_numpy(scene.mask) for scene in scenes])
    return images, masks, [scene.prompt for scene in scenes]


def load_vae(file: Path) -> nn.Module:
    """Return an AutoencoderTiny with diffusers' default configuration and a safetensors file's weights, in fp32."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    vae: Any = AutoencoderTiny()
    vae = vae.float()
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return vae


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch: int = 32) -> Tensor:
    """Return latents fp32 [B, 4, h, w] of uint8 images, before the scaling factor; computed in bf16."""
    vae.to(memory_format=torch.channels_last)
    parts = []
    for part in images.split(batch):
        pixels = (part.to(vae.device).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            parts.append(vae.encode(pixels).latents.float().cpu())
    return torch.cat(parts)


def tokens(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Return token ids [B, 77], padded and truncated as the pipeline does."""
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def encode_scenes(
    vae: Any,
    world: World,
    tokenizer: Any,
    seed: int,
    first: int,
    num: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compose and encode P scenes.

    Returns:
        latents [P, 4, h, w], scaled; token ids [P, 77]; [P, 1, h, w], the share of a latent's pixels on an object.
    """
    latents, ids, shares = [], [], []
    for start in range(first, first + num, 500):
        images, masks, prompts = compose(world, seed, start, min(500, first + num - start))
        latents.append(encode(vae, images) * vae.config.scaling_factor)
        ids.append(tokens(tokenizer, prompts))
        shares.append(F.avg_pool2d((masks > 0).float()[:, None], 8))
        progress(start - first + len(images))
    return torch.cat(latents), torch.cat(ids), torch.cat(shares)


def save_latents(file: Path, latents: Tensor, ids: Tensor, shares: Tensor) -> None:
    """Write encoded scenes in 16 bits under a temporary name, then put the file in its place."""
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}.tmp")
    save_file({"latents": latents.half().contiguous(), "ids": ids.to(torch.int16), "shares": shares.half()}, temporary)
    os.replace(temporary, file)


def load_latents(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Read the encoded scenes of all files in a folder, in the form that `encode_scenes` returns."""
    from safetensors.torch import load_file

    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    latents, ids, shares = (torch.cat([part[name] for part in parts]) for name in ("latents", "ids", "shares"))
    return latents.float(), ids.long(), shares.float()


def add_world_arguments(parser: argparse.ArgumentParser, *, seed: int = 0, pool: int | None = None) -> None:
    """Add the arguments that choose scenes of the training world."""
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--first", type=int, default=0, help="first scene of the training world to use")
    parser.add_argument("--two", type=float, default=0.25, help="share of scenes with two objects")
    parser.add_argument("--assets", type=Path, help="folder of cut-outs; the packaged ones when left out")
    parser.add_argument("--list", choices=("small", "full"), default="small")
    parser.add_argument("--threads", type=int, default=1)
    if pool is not None:
        parser.add_argument("--pool", type=int, default=pool, help="scenes kept in memory at a time")


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments of a training, seed torch, and make the folder `out`."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    """Encode scenes of the training world into one file."""
    from diffusers import AutoencoderTiny
    from transformers import CLIPTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--vae", type=Path, required=True, help="diffusers folder of the VAE")
    parser.add_argument("--num", type=int, required=True)
    add_world_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderTiny.from_pretrained(args.vae).float().to(device)
    world = World(load_sprites(args.assets, args.list), two=args.two)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)

    def progress(scenes: int) -> None:
        print(f"{scenes}/{args.num}", flush=True)

    save_latents(args.file, *encode_scenes(vae, world, tokenizer, args.seed, args.first, args.num, progress))


if __name__ == "__main__":
    main()
