"""Train the embedded model on the composed world: a VAE (or take a trained one), then UNet and text encoder.

    python -m diffumask_fast.mini.train OUT --stage vae  --steps 3200
    python -m diffumask_fast.mini.train OUT --stage ready --vae taesd.safetensors       (or take this one)
    python -m diffumask_fast.mini.latents FOLDER/0.safetensors --vae OUT/vae --num 8000   (optional)
    python -m diffumask_fast.mini.train OUT --stage unet --steps 5000 [--latents FOLDER] [--init-from OUT]
    python -m diffumask_fast.mini.train OUT --stage decoder --steps 6000 --init-from OUT

OUT becomes a diffusers folder of fp16 safetensors with averaged (EMA) weights. It is saved every few minutes: after a
killed run, start again with `--init-from OUT`. One CPU core is enough; with CUDA, training runs there. Both use bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffumask_fast.mini.latents import (
    add_world_arguments,
    begin,
    compose,
    encode,
    encode_scenes,
    load_latents,
    load_vae,
    tokens,
)
from diffumask_fast.mini.tokenizer import write_tokenizer
from diffumask_fast.mini.world import HOME, SCENES, World, load_sprites

SAVE_SECONDS = 240
READ_STEPS = 500  # steps after which --latents is read again, for new files
DEFAULTS = {
    "num_inference_steps": 25, "guidance_scale": 4.0, "scheduler": "DPMSolverMultistepScheduler",
    "mask": {"aggregation": "finest", "propagate": 1},
}  # fmt: skip


def new_vae() -> Any:
    """Return an untrained VAE: factor 8, 4 latent channels, deterministic."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(0, 1, 2, 3), num_decoder_blocks=(3, 2, 2, 1), latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip


def new_unet() -> Any:
    """Return an untrained UNet with cross-attention at 16x16, 8x8 and 4x4; heads of 16, 32 and 40."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def new_text_encoder(tokenizer: Any) -> Any:
    """Return an untrained CLIP text encoder without layers: a token's state depends on its id and position alone.

    In a causal encoder all later tokens carry the class word's meaning too, and the padding then gets most of the
    attention. Without layers only the word's own token carries it, so the token's map shows the object.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=0, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def new_scheduler() -> Any:
    """Return the scheduler of the folder; training uses its noise schedule."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        algorithm_type="dpmsolver++", solver_order=2, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


class Ema:
    """Exponential moving average of the weights of some modules."""

    def __init__(self, modules: Sequence[nn.Module], decay: float = 0.9985) -> None:
        self.modules, self.decay, self.steps = modules, decay, 0
        self.averages = [copy.deepcopy(module).eval().requires_grad_(False) for module in modules]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for module, average in zip(self.modules, self.averages, strict=True):
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)


def optimiser(
    modules: Sequence[nn.Module], lr: float, steps: int, warmup: int = 150
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, list[nn.Parameter]]:
    """Return AdamW, its schedule (a warm-up, then cosine decay to zero) and the trained parameters."""
    parameters = [p for module in modules for p in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    factor = lambda s: min((s + 1) / warmup, 1) * (0.5 + 0.5 * math.cos(math.pi * min(s / steps, 1)))  # noqa: E731
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor), parameters


def save(folder: Path, module: Any, name: str) -> None:
    """Write one component in fp16 under a temporary name, then rename its files."""
    temporary = folder / f".{name}.tmp"
    copy.deepcopy(module).half().save_pretrained(temporary, safe_serialization=True)
    config = json.loads((temporary / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)
    if "dtype" in config:  # else transformers would load it in fp16, and diffusers the others in fp32
        config["dtype"] = "float32"
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    final = folder / name
    final.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():
        file.chmod(0o644)
        os.replace(file, final / file.name)
    temporary.rmdir()


def train_vae(args: argparse.Namespace, world: World, device: torch.device) -> None:
    """Train the VAE with noise on its latents.

    The loss is L1 and squared error, higher on objects, and the error's gradients at three scales. Stage "decoder"
    trains the decoder alone: a trained UNet goes on working, because its latents stay the same.
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(args.init_from, subfolder="vae").float() if args.init_from else new_vae()
    vae = vae.to(device, memory_format=torch.channels_last)
    trains_encoder = args.stage == "vae"
    vae.encoder.requires_grad_(trains_encoder)
    ema = Ema([vae])
    adam, schedule, parameters = optimiser([vae if trains_encoder else vae.decoder], args.lr or 1.5e-3, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    log, batch = Log(args, args.stage), args.batch_size or 8
    refresh = max(1, 5 * args.pool // batch)
    for step in range(args.steps):
        if step % refresh == 0:
            images, masks, _ = compose(world, args.seed, args.first + step // refresh * args.pool, args.pool)
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = (images[rows].to(device).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        weight = pixel_weights(masks[rows].to(device) > 0, args.outline_weight)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(trains_encoder):
                latents = vae.encode(x).latents
            noisy = latents + args.latent_noise * latents.detach().float().std() * torch.randn_like(latents)
            decoded = vae.decode(noisy).sample
        error, latents = decoded.float() - x, latents.float()
        loss = (weight * (error.abs() + 2 * error.square())).mean() + gradient_loss(error)
        loss = loss + 1e-3 * latents.square().mean() + 1e-2 * latents.mean((0, 2, 3)).square().sum()
        descend(loss, adam, schedule, parameters)
        ema.update()
        if log.step(step, loss, error.detach().square().mean() / 4):
            finish_vae(args, ema.averages[0], images)
    finish_vae(args, ema.averages[0], images)
    new_scenes = compose(world, args.seed, 10**6, 256)[0]
    log.close(step, psnr_new_scenes_db=round(psnr(ema.averages[0], new_scenes), 2))


def pixel_weights(inside: Tensor, outline: float) -> Tensor:
    """Return weights [B, 1, H, W] for bool masks [B, H, W]: 1, near and on an object 3, on its outline more."""
    inside = inside.float()[:, None]
    near = F.max_pool2d(inside, 5, 1, 2)
    return 1 + 2 * near + outline * (F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1))


def gradient_loss(error: Tensor) -> Tensor:
    """Return the mean absolute gradient of the error at three scales."""
    total = error.new_zeros(())
    for _ in range(3):
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total


@torch.no_grad()
def psnr(vae: Any, images: Tensor) -> float:
    """Return the mean PSNR in dB of uint8 images after encoding and decoding."""
    values = []
    for part in images.split(32):
        x = part.to(vae.device).float() / 255
        y = (vae.decode(vae.encode(x * 2 - 1).latents).sample / 2 + 0.5).clamp(0, 1)
        values.append(-10 * (x - y).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def finish_vae(args: argparse.Namespace, vae: Any, images: Tensor) -> None:
    if args.stage != "decoder":
        vae.register_to_config(scaling_factor=1 / encode(vae, images[:512]).std().item())
    save(args.out, vae, "vae")


def take_vae(args: argparse.Namespace, world: World, device: torch.device) -> None:
    """Take a trained AutoencoderTiny; set the scaling factor that gives the world's latents unit variance."""
    vae = load_vae(args.vae).to(device)
    finish_vae(args, vae, compose(world, args.seed, args.first, 512)[0])


def load_text(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the tokenizer, and a new text encoder or the one of --init-from."""
    from transformers import CLIPTextModel, CLIPTokenizer

    write_tokenizer(args.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    if not args.init_from:
        return tokenizer, new_text_encoder(tokenizer)
    return tokenizer, CLIPTextModel.from_pretrained(args.init_from, subfolder="text_encoder").float()


def train_unet(args: argparse.Namespace, world: World, device: torch.device) -> None:
    """Train UNet and text encoder: v-prediction, squared error, higher on objects; 10 % of the prompts are empty."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    tokenizer, text = load_text(args)
    vae = None if args.latents else AutoencoderTiny.from_pretrained(args.out, subfolder="vae").float().to(device)
    init = args.init_from
    unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet").float() if init else new_unet()
    unet, text = unet.to(device), text.to(device)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slower on the CPU
    ema = Ema([unet, text])
    adam, schedule, parameters = optimiser([unet, text], args.lr or 8e-4, args.steps)
    scheduler = new_scheduler()
    write_index(args.out, world)
    alphas = scheduler.alphas_cumprod.to(device)
    empty = tokens(tokenizer, [""])
    generator = torch.Generator().manual_seed(args.seed)
    log, batch = Log(args, "unet"), args.batch_size or 32
    refresh = READ_STEPS if args.latents else max(1, 8 * args.pool // batch)
    for step in range(args.steps):
        if step % refresh == 0:
            first = args.first + step // refresh * args.pool
            pool = args.latents and load_latents(args.latents)
            pool = pool or encode_scenes(vae, world, tokenizer, args.seed, first, args.pool)
            latents, ids, weights = pool
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x, noise = latents[rows].to(device), torch.randn(batch, 4, 16, 16, generator=generator).to(device)
        dropped = torch.rand(batch, 1, generator=generator) < 0.1
        prompt_ids = torch.where(dropped, empty, ids[rows]).to(device)
        timesteps = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 1000
        timesteps = timesteps.long().to(device)
        a = alphas[timesteps][:, None, None, None]
        noisy, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with torch.autocast(device.type, torch.bfloat16):
            states = text(prompt_ids)[0]
            predicted = unet(noisy, timesteps, states).sample
        error = (predicted.float() - target).square()
        descend((error * (1 + args.object_weight * weights[rows].to(device))).mean(), adam, schedule, parameters)
        ema.update()
        if log.step(step, error.detach().mean()):
            save(args.out, ema.averages[0], "unet")
            save(args.out, ema.averages[1], "text_encoder")
    save(args.out, ema.averages[0], "unet")
    save(args.out, ema.averages[1], "text_encoder")
    log.close(step)


def write_index(folder: Path, world: World) -> None:
    """Write the scheduler and model_index.json of a pipeline, and `diffumask.json`: classes, scenes, defaults."""
    import diffusers

    scheduler = new_scheduler()
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderTiny"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    if not (folder / "diffumask.json").exists():
        info = {"classes": world.classes, "scenes": classes_by_scene(), **DEFAULTS}
        (folder / "diffumask.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")


def classes_by_scene() -> dict[str, list[str]]:
    """Return phrase of a scene -> the classes that belong there."""
    return {words: [name for name, home in HOME.items() if scene in home] for scene, words in SCENES.items()}


def descend(
    loss: Tensor,
    adam: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: list[nn.Parameter],
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    adam.step()
    schedule.step()
    adam.zero_grad()


class Log:
    """Prints progress, and appends a JSON line to OUT/training.jsonl at the end of a stage."""

    def __init__(self, args: argparse.Namespace, stage: str) -> None:
        self.args, self.stage = args, stage
        self.mean: Tensor | None = None
        self.start = self.saved = time.monotonic()

    def step(self, step: int, *values: Tensor) -> bool:
        """Add the losses of a step to their moving mean; return True when it is time to save."""
        losses = torch.stack([value.detach().float() for value in values])
        self.mean = losses if self.mean is None else torch.lerp(self.mean, losses, 0.02)
        if step % 50 == 0:
            seconds = time.monotonic() - self.start
            means = " ".join(f"{value:.4f}" for value in self.mean.tolist())
            print(f"{self.stage} {step}/{self.args.steps} loss {means} {seconds:.0f} s", flush=True)
        due = time.monotonic() - self.saved > SAVE_SECONDS
        if due:
            self.saved = time.monotonic()
        return due

    def close(self, step: int, **figures: float) -> None:
        row = {
            "stage": self.stage, "steps": step + 1, "seed": self.args.seed, "first": self.args.first,
            "init_from": bool(self.args.init_from), "lr": self.args.lr,
            "loss": [] if self.mean is None else [round(value, 4) for value in self.mean.tolist()],
            "seconds": round(time.monotonic() - self.start), **figures,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        with (self.args.out / "training.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=("vae", "ready", "decoder", "unet"), required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="stage ready: weights of an AutoencoderTiny, such as TAESD's")
    parser.add_argument("--latents", type=Path, help="folder of encoded scenes, in place of composing them")
    parser.add_argument("--init-from", type=Path, help="folder whose weights to start from")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--outline-weight", type=float, default=0.0, help="added to the pixels along an object's edge")
    parser.add_argument("--object-weight", type=float, default=1.0, help="added to latents full of an object")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="in standard deviations, before decoding")
    add_world_arguments(parser, pool=8000)
    args = begin(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(load_sprites(args.assets, args.list), two=args.two)
    stages = {"vae": train_vae, "ready": take_vae, "decoder": train_vae, "unet": train_unet}
    stages[args.stage](args, world, device)


if __name__ == "__main__":
    main()
