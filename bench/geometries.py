"""Models to measure with: the embedded one, or Stable Diffusion's exact shapes with seeded random weights."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffumask_fast import mini
from diffumask_fast.attention.families import has_unet
from diffumask_fast.attention.unet import attention_places
from diffumask_fast.bench import GEOMETRIES
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels.shapes import KEYS
from diffumask_fast.models.device import resolve_device, resolve_dtype
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.models.loading import quietly
from diffumask_fast.pipeline import DiffuMaskPipeline

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

# The published configurations, as far as they differ from the classes' defaults.
_SD = dict(
    down_block_types=(CROSS, CROSS, CROSS, PLAIN),
    up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    block_out_channels=(320, 640, 1280, 1280),
)
UNETS: dict[str, dict[str, Any]] = {
    "sd15": _SD | dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": _SD
    | dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "sdxl": dict(
        sample_size=128,
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
_CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
_CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
TEXTS: dict[str, tuple[dict[str, Any], ...]] = {
    "sd15": (_CLIP_L,),
    "sd21": (_CLIP_H | dict(hidden_act="gelu"),),
    "sdxl": (_CLIP_L, _CLIP_G | dict(hidden_act="gelu", projection_dim=1280)),
}
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
)
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
VOCABULARY = 49408


def open_geometry(
    geometry: str,
    device: str | torch.device = "auto",
    *,
    model: str | Path | None = None,
    dtype: str | None = None,
) -> DiffuMaskPipeline:
    """Load the embedded model or another folder, or build a geometry with random weights, the same every time.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        model: a diffusers folder or hub id in place of the geometry's own weights.
        dtype: "fp32", "fp16" or "bf16"; None is the device's default.

    Raises:
        DiffuMaskError: an unknown geometry, device or dtype, or a model that cannot be loaded.
    """
    check_geometry(geometry)
    device = resolve_device(device)
    if model is not None or geometry == "mini":
        pipe = DiffuMaskPipeline.from_pretrained(model or "mini", device=device, dtype=dtype)
        if not has_unet(pipe.pipe):
            raise DiffuMaskError(f"{model} has no UNet, and what is compared here draws with one: name another model.")
    else:
        with quietly():
            built = _build(geometry, device, resolve_dtype(dtype, device))
        pipe = DiffuMaskPipeline(built, ModelInfo(geometry))
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


def check_geometry(geometry: str) -> None:
    """Raise a DiffuMaskError for a geometry that is not there."""
    if geometry not in GEOMETRIES:
        raise DiffuMaskError(f"There is no geometry {geometry}: use {', '.join(GEOMETRIES)}.")


def unet_config(geometry: str) -> dict[str, Any]:
    """Return the UNet's configuration: the embedded model's, or the published one."""
    if geometry == "mini":
        return dict(UNet2DConditionModel.load_config(mini.folder() / "unet"))
    return UNETS[geometry]


def weight_bytes(geometry: str) -> int:
    """Return the bytes of all weights in fp32, counted on modules without storage."""
    with torch.device("meta"):
        if geometry == "mini":
            modules = [UNet2DConditionModel.from_config(unet_config(geometry))]
        else:
            modules = _modules(geometry)
    return sum(4 * parameter.numel() for module in modules for parameter in module.parameters())


def reference_bytes(geometry: str) -> int:
    """Return the bytes of the reference program's store at the end of a call of one image in fp32: sums and call."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(geometry))
    places, pixels = attention_places(unet), _pixels(unet)
    both_halves = 0
    for name, module in unet.named_modules():
        if module in places:
            queries = pixels[name.partition(".attentions")[0]]
            both_halves += 2 * module.heads * queries * (KEYS if places[module].cross else queries) * 4
    return 2 * both_halves


def cross_layers(geometry: str) -> Counter[tuple[int, int, int]]:
    """Count a geometry's cross-attention layers by (query pixels, heads, head size), in the order of the call."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(geometry))
    places, pixels = attention_places(unet), _pixels(unet)
    named = ((name.partition(".attentions")[0], module) for name, module in unet.named_modules())
    layers = ((pixels[block], attn) for block, attn in named if attn in places and places[attn].cross)
    return Counter((queries, attn.heads, attn.inner_dim // attn.heads) for queries, attn in layers)


def _pixels(unet: Any) -> dict[str, int]:
    """Return the query pixels of each block of the UNet."""
    pixels, depth, side = {}, 0, unet.config.sample_size
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    blocks += [("mid_block", unet.mid_block)] + [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    for name, block in blocks:
        pixels[name] = (side >> depth) ** 2
        depth += bool(getattr(block, "downsamplers", None)) - bool(getattr(block, "upsamplers", None))
    return pixels


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Return the memory that a process can still take: of the machine, within its control group, or of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/meminfo") else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    free = free or [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.exists() and used.exists() and (limit := most.read_text().strip()).isdigit():
        free.append(int(limit) - int(used.read_text()))
    return min(free)


def check_memory(geometry: str, device: str | torch.device = "cpu", *, reference: bool = True) -> None:
    """Refuse a geometry whose weights, and the reference program's store, do not fit, before anything is built.

    Raises:
        DiffuMaskError: says how much is needed and how much is there.
    """
    needed = 1.15 * (weight_bytes(geometry) + (reference_bytes(geometry) if reference else 0))
    free = free_bytes(device)
    if needed > free:
        what = " with the reference program's store beside it" if reference else ""
        raise DiffuMaskError(
            f"Geometry {geometry}{what} needs {needed / 2**30:.1f} GiB in fp32, and {free / 2**30:.1f} GiB are free: "
            "use a smaller geometry, rows without the reference, or a larger machine."
        )


def _modules(geometry: str) -> list[torch.nn.Module]:
    """Make UNet, VAE and text encoders, in this order."""
    tokenizer = _tokenizer()
    texts: list[Any] = []
    for index, text in enumerate(TEXTS[geometry]):
        config = CLIPTextConfig(
            vocab_size=VOCABULARY,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        )
        texts.append((CLIPTextModelWithProjection if index else CLIPTextModel)(config))
    side = 1024 if geometry == "sdxl" else 512
    vae = AutoencoderKL(**VAE, sample_size=side, scaling_factor=0.13025 if geometry == "sdxl" else 0.18215)
    modules: tuple[Any, ...] = (UNet2DConditionModel(**UNETS[geometry]), vae, *texts)
    return [module.eval() for module in modules]


def _tokenizer() -> CLIPTokenizer:
    """Return the embedded model's: a vocabulary of its own, and 77 positions as everywhere."""
    return CLIPTokenizer.from_pretrained(mini.folder() / "tokenizer")


def _build(geometry: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a geometry on its device: weights are the same every time on a CPU, and on CUDA; the two differ."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else ()), device:
        torch.manual_seed(0)
        unet, vae, *texts = (module.to(dtype) for module in _modules(geometry))
    if geometry == "sdxl":
        return StableDiffusionXLPipeline(
            vae=vae, unet=unet, text_encoder=texts[0], text_encoder_2=texts[1], tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(), scheduler=EulerDiscreteScheduler(**NOISE), add_watermarker=False,
        )  # fmt: skip
    kind = {"prediction_type": "v_prediction"} if geometry == "sd21" else {}
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, **kind)
    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=texts[0], tokenizer=_tokenizer(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
