"""Tiny real SD3 and FLUX pipelines of random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, make_text_encoder, sharpen, write_tokenizer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 80  # of what the transformers take of a text: wider than what SD3's two CLIP encoders give together
PIECES = {"sofa": ("▁so", "fa")}  # T5 has two where CLIP has one; CLIP has two for "potted" and "dining"


def write_t5_tokenizer(folder: Path) -> None:
    """Write a T5 tokenizer that knows WORDS: one token each, two for those of PIECES, letters for all others."""
    pieces = [piece for word in WORDS for piece in PIECES.get(word, (f"▁{word}",))]
    letters = ["▁", *(chr(c) for c in range(33, 127))]
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, **dict.fromkeys(pieces, -1.0), **dict.fromkeys(letters, -9.0)}
    made = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    settings = {"model_max_length": 512, "tokenizer_class": "T5Tokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def make_vae() -> AutoencoderKL:
    """Pixels are halved three times, as in the real ones."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def make_sd3_transformer(**changes) -> SD3Transformer2DModel:
    """Three blocks, the first with a second attention of the image alone, heads of 16, normalised queries and keys."""
    config = dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return SD3Transformer2DModel(**{**config, **changes}).eval()


def make_flux_transformer(**changes) -> FluxTransformer2DModel:
    """Two blocks of both kinds, heads of 16, distilled guidance."""
    config = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxTransformer2DModel(**{**config, **changes}).eval()


def new_pipe(kind, parts: dict, **kwargs):
    """Make a pipeline of parts that may be shared, with a scheduler of its own and no progress bar."""
    pipe = kind(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> tuple[T5TokenizerFast, T5EncoderModel]:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("t5") / "tokenizer"
    write_t5_tokenizer(folder)
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    return tokenizer, make_t5_encoder(tokenizer)


@pytest.fixture(scope="session")
def parts_of_sd3(tokenizer, t5) -> dict:
    torch.manual_seed(3)
    return dict(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer, projected=True),
        text_encoder_2=make_text_encoder(tokenizer, projected=True),
        text_encoder_3=t5[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5[0],
        transformer=sharpen(make_sd3_transformer()),
    )


@pytest.fixture(scope="session")
def parts_of_flux(tokenizer, t5) -> dict:
    torch.manual_seed(4)
    return dict(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        text_encoder_2=t5[1],
        tokenizer=tokenizer,
        tokenizer_2=t5[0],
        transformer=sharpen(make_flux_transformer()),
    )


def save(pipe, folder: Path) -> Path:
    """Write a pipeline's folder, its tokenizers as published ones are."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in sorted(folder.glob("tokenizer*")):
        shutil.rmtree(path)
        (write_t5_tokenizer if isinstance(getattr(pipe, path.name), T5TokenizerFast) else write_tokenizer)(path)
    return folder


@pytest.fixture
def sd3(parts_of_sd3) -> StableDiffusion3Pipeline:
    """SD3.5's kind, 64x64 pixels; parts are shared, pipeline and scheduler are new for each test."""
    return new_pipe(StableDiffusion3Pipeline, parts_of_sd3)


@pytest.fixture
def flux(parts_of_flux) -> FluxPipeline:
    """FLUX.1-dev's kind."""
    return new_pipe(FluxPipeline, parts_of_flux)
