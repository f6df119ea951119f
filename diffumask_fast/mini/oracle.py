"""The oracle: a small segmenter trained on the composed world's exact masks.

It predicts the masks of images that the embedded model drew, so that generated masks can be compared with them. Only
tests, the bench and `diffumask-fast evaluate mini-oracle` use it; no mask is made with it.

    python -m diffumask_fast.mini.oracle OUT --steps 7000 [--init-from FILE]      trains OUT/oracle.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffumask_fast.mini.world import VOC, World, load_sprites

WEIGHTS = Path(__file__).with_name("oracle.safetensors")
WIDTHS = (32, 64, 96, 128)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


class Oracle(nn.Module):
    """U-shaped segmenter: images [B, 3, H, W] in -1..1, H and W multiples of 16, to logits [B, 1 + classes, H, W]."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.class_ids = {name: VOC[name].id for name in self.classes}
        self.stem = nn.Conv2d(12, WIDTHS[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.before = nn.ModuleList(Block(width) for width in WIDTHS)
        self.after = nn.ModuleList(Block(width) for width in WIDTHS)
        self.deepest = nn.Sequential(Block(WIDTHS[-1]), Block(WIDTHS[-1]))
        self.whole = nn.Linear(WIDTHS[-1], WIDTHS[-1])
        self.head = nn.Conv2d(WIDTHS[0], 4 * (1 + len(self.classes)), 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(images, 2))
        skips = []
        for level, block in enumerate(self.before):
            x = block(x if level == 0 else self.down[level - 1](x))
            skips.append(x)
        x = self.deepest(x)
        x = x + self.whole(x.mean((2, 3)))[:, :, None, None]
        for level in reversed(range(len(WIDTHS))):
            x = self.after[level](x if level == len(WIDTHS) - 1 else skips[level] + self._wider(level, x))
        return F.pixel_shuffle(self.head(x), 2)

    def _wider(self, level: int, x: Tensor) -> Tensor:
        return F.interpolate(self.up[level](x), scale_factor=2, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def masks(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """Return the predicted masks, uint8 [B, H, W] of VOC's class ids, of images uint8 [B, H, W, 3].

        Each image is seen as it is and in the mirror, and the two answers are averaged.
        """
        device = self.stem.weight.device
        ids = torch.tensor([0, *self.class_ids.values()], dtype=torch.uint8)
        masks = []
        for start in range(0, len(images), batch):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch])).permute(0, 3, 1, 2)
            part = part.to(device).float() / 127.5 - 1
            answer = self(part).softmax(1) + self(part.flip(3)).softmax(1).flip(3)
            masks.append(ids[answer.argmax(1).cpu()])
        return torch.cat(masks).numpy()


def load_oracle(file: Path | None = None) -> Oracle:
    """Return a trained oracle in fp32, ready to predict; the packaged one if `file` is None."""
    from safetensors import safe_open

    with safe_open(file or WEIGHTS, "pt") as stored:
        oracle = Oracle(json.loads(stored.metadata()["classes"]))
        oracle.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return in_channels_last(oracle.float().eval().requires_grad_(False))


def in_channels_last(module: Any) -> Any:
    """Return a module with its weights in channels_last, which is faster on CPUs."""
    return module.to(memory_format=torch.channels_last)


def save_oracle(oracle: Any, file: Path) -> None:
    """Write the oracle in fp16 under a temporary name, then rename the file."""
    from safetensors.torch import save_file

    halves = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in oracle.state_dict().items()
    }
    temporary = file.with_name(f".{file.name}.tmp")
    save_file(halves, temporary, {"classes": json.dumps(oracle.classes)})
    os.replace(temporary, file)


def train(args: argparse.Namespace) -> None:
    """Train on scenes and their VAE round trips; some are warped, some are partly covered by another scene."""
    from diffusers import AutoencoderTiny

    from diffumask_fast.mini.latents import compose
    from diffumask_fast.mini.train import Ema, Log, descend, optimiser

    world = World(load_sprites(args.assets, args.list), two=args.two)
    oracle = Oracle(world.classes)
    if args.init_from:
        take_weights(oracle, load_oracle(args.init_from))
    oracle = in_channels_last(oracle)
    vae = in_channels_last(AutoencoderTiny.from_pretrained(args.vae).float())
    labels = torch.zeros(256, dtype=torch.long)
    labels[list(oracle.class_ids.values())] = torch.arange(1, 1 + len(oracle.classes))
    ema = Ema([oracle], decay=0.998)
    adam, schedule, parameters = optimiser([oracle], args.lr or 2e-3, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    log, batch = Log(args, "oracle"), args.batch_size or 16
    refresh = max(1, 8 * args.pool // batch)
    for step in range(args.steps):
        if step % refresh == 0:
            images, masks, _ = compose(world, args.seed, args.first + step // refresh * args.pool, args.pool)
            decoded = round_trips(vae, images, generator, args.latent_noise)
        rows = torch.randint(len(images), (batch,), generator=generator)
        exact = torch.rand(batch, 1, 1, 1, generator=generator) >= args.decoded
        x = torch.where(exact, images[rows], decoded[rows]).float() / 127.5 - 1
        x, y = augment(x, labels[masks[rows].long()], generator, args.augmented)
        with torch.autocast("cpu", torch.bfloat16):
            logits = oracle(x.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y)
        descend(loss, adam, schedule, parameters)
        ema.update()
        copy_buffers(oracle, ema.averages[0])
        if log.step(step, loss):
            save_oracle(ema.averages[0], args.out / WEIGHTS.name)
    save_oracle(ema.averages[0], args.out / WEIGHTS.name)
    log.close(step)


@torch.no_grad()
def take_weights(oracle: Any, trained: Any) -> None:
    """Copy a trained oracle's weights; the head keeps its own for classes that the trained one does not know."""
    body = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("head")}
    oracle.load_state_dict(body, strict=False)
    names, known = ["background", *oracle.classes], ["background", *trained.classes]
    for name in set(names) & set(known):
        target, source = 4 * names.index(name), 4 * known.index(name)
        oracle.head.weight[target : target + 4] = trained.head.weight[source : source + 4]
        oracle.head.bias[target : target + 4] = trained.head.bias[source : source + 4]


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def round_trips(vae: Any, images: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Encode and decode uint8 images, with up to `noise` standard deviations of noise on the latents."""
    parts = []
    for part in images.split(32):
        latents = vae.encode((part.float() / 127.5 - 1).to(memory_format=torch.channels_last)).latents
        strength = noise * latents.std() * torch.rand(len(latents), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        parts.append(((vae.decode(latents).sample.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8))
    return torch.cat(parts)


def augment(x: Tensor, y: Tensor, generator: torch.Generator, chance: float = 1 / 3) -> tuple[Tensor, Tensor]:
    """Warp images smoothly, and cover parts of them by the previous image in the batch, each with this chance."""
    batch, size = len(x), x.shape[-1]
    share = torch.rand(2, batch, generator=generator) < chance
    wave = F.interpolate(torch.randn(batch, 2, 5, 5, generator=generator), (size, size), mode="bicubic")
    strength = 0.07 * torch.rand(batch, 1, 1, 1, generator=generator) * share[0][:, None, None, None]
    grid = F.affine_grid(torch.eye(2, 3).expand(batch, 2, 3), list(x.shape), align_corners=False)
    grid = grid + (wave * strength).permute(0, 2, 3, 1)
    warped = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = torch.where(share[0][:, None, None, None], warped, x)
    y = F.grid_sample(y[:, None].float(), grid, "nearest", "reflection", False)[:, 0].round().long()
    angle = torch.rand(batch, 1, 1, generator=generator) * 2 * torch.pi
    axis = torch.linspace(-1, 1, size)
    along = axis[None, :, None] * angle.sin() + axis[None, None, :] * angle.cos()
    ripple = 0.3 * F.interpolate(torch.randn(batch, 1, 4, 4, generator=generator), (size, size), mode="bicubic")[:, 0]
    hidden = (along + ripple > torch.rand(batch, 1, 1, generator=generator) * 0.8 - 0.2) & share[1][:, None, None]
    x = torch.where(hidden[:, None], x.roll(1, 0), x)
    y = torch.where(hidden, y.roll(1, 0), y)
    light = 1 + 0.1 * torch.randn(batch, 3, 1, 1, generator=generator)
    return x * light + 0.06 * torch.randn(batch, 3, 1, 1, generator=generator), y


def copy_buffers(module: nn.Module, average: nn.Module) -> None:
    """Copy the running statistics of a module's norms to its average."""
    for source, target in zip(module.buffers(), average.buffers(), strict=True):
        target.copy_(source)


def main() -> None:
    from diffumask_fast.mini.latents import add_world_arguments, begin

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--vae", type=Path, default=WEIGHTS.parent / "weights" / "vae")
    parser.add_argument("--init-from", type=Path)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--decoded", type=float, default=0.5, help="share of pictures that went through the VAE")
    parser.add_argument("--latent-noise", type=float, default=0.3, help="at most, in standard deviations")
    parser.add_argument(
        "--augmented", type=float, default=1 / 3, help="share that is warped, share that is half hidden"
    )
    add_world_arguments(parser, seed=1, pool=4000)
    train(begin(parser))


if __name__ == "__main__":
    main()
