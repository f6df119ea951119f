"""Tiny real pipelines, shared by all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(min(2, torch.get_num_threads()))

import json  # noqa: E402
import sys  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

import pytest  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models import attention_processor  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402

pytest_plugins = ["not_run", "exported", "tiny_mmdit"]
WORDS = "a photo of the dog cat car bus horse sofa and on grass street table plant dining potted red".split()
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
SPLIT_WORDS = {"potted": ("pot", "ted"), "dining": ("din", "ing")}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Write out halves of letters in what a test has logged: a report travels between processes as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply the merges to the symbols of a word, lowest rank first."""
    while pairs := [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:], strict=False)) if p in ranks]:
        i = min(pairs)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
    return symbols


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer that knows WORDS: one token each, two for those of SPLIT_WORDS, letters for all others."""
    letters = [chr(c) for c in range(33, 127)]
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = SPLIT_WORDS.get(word, (word,))
        while len(symbols := merge([*word[:-1], word[-1] + "</w>"], merges)) > len(parts):
            at = 1 if symbols[0] == parts[0] else 0
            merges[symbols[at], symbols[at + 1]] = len(merges)
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_text_encoder(tokenizer: CLIPTokenizer, projected: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def make_unet(**changes) -> UNet2DConditionModel:
    """Cross-attention at three levels, as the embedded model has it, heads of 16 and 32."""
    config = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=32,
    )
    return UNet2DConditionModel(**{**config, **changes}).eval()


def make_vae(channels: int = 8) -> AutoencoderTiny:
    wide = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(channels,) * 4)
    return AutoencoderTiny(**wide, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()


def sharpen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Scale the queries, for random attention is so flat that wrong maps would look right."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("to_q.weight"):
                parameter.mul_(12)
    return unet


def new_pipe(kind: type[DiffusionPipeline], parts: dict, **kwargs) -> DiffusionPipeline:
    """Make a pipeline of parts that may be shared, with a scheduler of its own and no progress bar."""
    pipe = kind(**parts, scheduler=DDIMScheduler(**NOISE), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, steps=3, seed=0, output_type="np", **kwargs):
    """Draw as an array, in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type=output_type, **kwargs).images


def relative(value, truth):
    """Return the largest error over the largest true value."""
    return ((value - truth).abs().max() / truth.abs().max()).item()


def footprint(pipe):
    """Return what collecting must leave as it is; names with an underscore are the pipeline's own state."""
    processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    return {name for name in pipe.__dict__ if not name.startswith("_")}, set(pipe.unet.__dict__), processors


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def sd_parts(tokenizer) -> dict:
    torch.manual_seed(1)
    return dict(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=sharpen(make_unet()),
        safety_checker=None,
        feature_extractor=None,
    )


@pytest.fixture
def tiny_sd(sd_parts) -> StableDiffusionPipeline:
    """An SD-shaped pipeline, 64x64 pixels; parts are shared, pipeline and scheduler are new for each test."""
    return new_pipe(StableDiffusionPipeline, sd_parts, requires_safety_checker=False)


@pytest.fixture(scope="session")
def sdxl_parts(tokenizer) -> dict:
    torch.manual_seed(2)
    unet = make_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return dict(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        text_encoder_2=make_text_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sharpen(unet),
    )


@pytest.fixture
def tiny_sdxl(sdxl_parts) -> StableDiffusionXLPipeline:
    """An SDXL-shaped pipeline: two text encoders, no attention at the finest level."""
    return new_pipe(StableDiffusionXLPipeline, sdxl_parts, add_watermarker=False)


@pytest.fixture(scope="session")
def tiny_folder(sd_parts, tmp_path_factory) -> Path:
    """A diffusers folder with the parts of tiny_sd, safetensors; treat it as read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    pipe = new_pipe(StableDiffusionPipeline, sd_parts, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer").rmdir()
    write_tokenizer(folder / "tokenizer")
    return folder


class Recorder(AttnProcessor2_0):
    """An independent store of all probabilities: draws as the plain processor, and keeps an explicit fp32 softmax."""

    def __init__(self):
        super().__init__()
        self.cross, self.own = [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context))
        q, k = (x.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        probs = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        (self.own if encoder_hidden_states is None else self.cross).append(probs.detach())
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def maps(self, select, rows):
        """Average kept cross-attention over heads, layers and calls: a list of [Bc, K, N], the finest level first."""
        pixels = sorted({p.shape[2] for p in self.cross}, reverse=True)
        out = []
        for num in pixels:
            means = torch.stack([p[rows].mean(1) for p in self.cross if p.shape[2] == num]).mean(0)
            out.append((means @ select).transpose(1, 2))
        return out

    def propagate(self, prior, rows):
        """Apply each layer's self-attention to a prior [Bc, M, N] of its level, and average."""
        seen = [p[rows].mean(1) for p in self.own if p.shape[2] == prior.shape[-1]]
        return torch.stack([prior @ p.transpose(1, 2) for p in seen]).mean(0)


@pytest.fixture
def recording():
    """Give a context manager that records the probabilities of a UNet."""

    @contextmanager
    def record(unet):
        kept, recorder = unet.attn_processors, Recorder()
        unet.set_attn_processor(recorder)
        try:
            yield recorder
        finally:
            unet.set_attn_processor(kept)

    return record


@pytest.fixture
def xformers(monkeypatch):
    """Put a stand-in for xformers in place, its operator an explicit softmax; give the list of its calls' arguments."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        calls.append({"query": query, "key": key, "op": op})
        scores = query @ key.transpose(1, 2) * scale
        return torch.softmax(scores if attn_bias is None else scores + attn_bias, -1) @ value

    library = ModuleType("xformers")
    library.ops = ModuleType("xformers.ops")
    library.ops.memory_efficient_attention = memory_efficient_attention
    for module in (library, library.ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention_processor, "xformers", library)
    return calls
