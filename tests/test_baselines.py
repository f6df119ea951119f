"""bench/baselines.py: each baseline's maps and masks against ours, with the same weights and latents."""

import copy

import numpy as np
import pytest
import torch

from diffumask_fast import DiffuMaskError, collect_maps
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.bench import baselines
from diffumask_fast.bench.baselines import DaamStore, PeerMaps, ReferenceStore, plain_attention, reference_mask
from diffumask_fast.bench.geometries import open_geometry
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions

PROMPTS, PHRASES = ["a photo of a dog on the grass", "a red car on the street"], [["dog"], ["car"]]
MAPS = MapOptions(aggregation="reference", propagate="none")
MASK = MaskOptions(threshold=0.45, refine="none")
STEPS = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ours(tiny_sd, latents):
    with collect_maps(tiny_sd, PHRASES, propagate="none") as maps:
        tiny_sd(PROMPTS, latents=latents, **STEPS)
    return maps


@pytest.fixture
def select(tiny_sd):
    return phrase_columns(tiny_sd.tokenizer, PROMPTS, PHRASES, length=77)


def each_alone(kind, pipe, latents):
    """Draw the prompts one by one, as programs do that take one at a time."""
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad(), kind(pipe) as store:
            image = pipe(prompt, latents=latents[row : row + 1], **STEPS).images
        yield row, store, image


def masks(class_maps):
    images = torch.zeros(*class_maps.shape[:1], 64, 64, 3, dtype=torch.uint8)
    return make_masks(class_maps, images, MASK, torch.full(class_maps.shape[:2], 12))[0] > 0


def bicubic(level, size):
    side = int(level.shape[-1] ** 0.5)
    level = level.view(1, -1, side, side)
    return torch.nn.functional.interpolate(level, (size, size), mode="bicubic", align_corners=False)[0]


def iou(left, right):
    return ((left & right).sum() / (left | right).sum()).item()


def test_the_reference_store_has_our_maps(tiny_sd, latents, ours, select):
    for row, store, _ in each_alone(ReferenceStore, tiny_sd, latents):
        assert store.calls == 2
        for key, level in store.levels(select[row]).items():
            error = (level - ours.levels[key][row]).abs().max() / level.max()
            assert error < 1e-4, (key, error)
            assert (level - level.mean()).abs().max() / level.max() > 0.05  # a flat map would not pass


def test_the_references_aggregation_and_masks_are_ours(tiny_sd, latents, ours, select):
    ours_maps = ours.class_maps(MAPS)
    for row, store, _ in each_alone(ReferenceStore, tiny_sd, latents):
        theirs = store.class_maps(select[row], 8)
        same = bicubic(store.levels(select[row])["1"], 8) >= 0  # ours has no bicubic overshoot, the reference has
        assert same.float().mean() > 0.8
        assert torch.allclose(theirs[same], ours_maps[row][same], atol=1e-4)
        assert (theirs - ours_maps[row]).abs().max() < 0.05
        assert iou(masks(theirs[None]), masks(ours_maps[row : row + 1])) >= 0.98
        assert store.class_maps(select[row], 64).shape == (1, 64, 64)


def test_the_reference_store_keeps_both_halves_of_every_layer(tiny_sd, latents):
    _, store, _ = next(each_alone(ReferenceStore, tiny_sd, latents))
    kept = {(attn.heads, total.shape[1], total.shape[2]) for attn, total in zip(store._order, store._sums, strict=True)}
    assert {keys for _, _, keys in kept} == {77, 64, 16, 4}
    assert store.num_bytes == sum(2 * total.nbytes for total in store._sums)
    store.clear()
    assert store.num_bytes == 0


def test_a_token_is_divided_by_its_own_maximum_before_the_mean(tiny_sd, latents):
    prompt, phrase = "a potted plant on the table", ["potted plant"]
    select = phrase_columns(tiny_sd.tokenizer, [prompt], [phrase], length=77)[0]
    with torch.no_grad(), ReferenceStore(tiny_sd) as store:
        tiny_sd(prompt, latents=latents[:1], **STEPS)
    each = torch.diag((select[:, 0] > 0).float())[:, select[:, 0] > 0]
    singles = store.class_maps(each, 16)
    assert singles.shape[0] == 3
    assert torch.allclose(store.class_maps(select, 16)[0], singles.mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", [ReferenceStore, DaamStore])
def test_a_store_draws_the_same_image_and_is_gone_afterwards(tiny_sd, latents, kind):
    before = {name: id(processor) for name, processor in tiny_sd.unet.attn_processors.items()}
    plain = tiny_sd(PROMPTS[0], latents=latents[:1], **STEPS).images
    _, _, image = next(each_alone(kind, tiny_sd, latents))
    assert torch.allclose(plain, image, atol=1e-4) and not torch.equal(plain, latents[:1])
    with pytest.raises(RuntimeError, match="no"), kind(tiny_sd):
        raise RuntimeError("no")
    assert {name: id(processor) for name, processor in tiny_sd.unet.attn_processors.items()} == before


def test_half_precision_gives_nearly_the_same_maps(tiny_sd, latents, ours, select):
    for name in ("unet", "text_encoder"):
        setattr(tiny_sd, name, copy.deepcopy(getattr(tiny_sd, name)).to(torch.float16))
    _, store, _ = next(each_alone(ReferenceStore, tiny_sd, latents.half()))
    assert store._sums[0].dtype == torch.float16
    theirs = store.class_maps(select[0], 8)
    assert (theirs.clamp_min(0) - ours.class_maps(MAPS)[0]).abs().max() < 0.05


def test_daam_keeps_a_sum_for_each_layer_and_head(tiny_sd, latents, select, recording):
    with recording(tiny_sd.unet) as recorder, torch.no_grad():
        tiny_sd(PROMPTS[0], latents=latents[:1], **STEPS)
    calls = len(recorder.cross) // 2
    summed = [one + other for one, other in zip(recorder.cross[:calls], recorder.cross[calls:], strict=True)]
    kept = [probs[1] for probs in summed if probs.shape[2] > 4]  # the coarsest level, 2x2, is left out
    heads = [bicubic(head.T, 8).clamp_min(0) for probs in kept for head in probs]
    truth = torch.einsum("tk,thw->khw", select[0], torch.stack(heads).mean(0))
    _, store, _ = next(each_alone(DaamStore, tiny_sd, latents))
    assert len(store.sums) == len(heads) == 12
    assert torch.allclose(store.class_maps(select[0], 8), truth, atol=1e-4 * truth.max())
    assert truth.std() / truth.mean() > 0.1


def test_daams_and_the_references_masks_of_the_embedded_model_are_ours():
    pipe = open_geometry("mini", "cpu").pipe
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    select = phrase_columns(pipe.tokenizer, PROMPTS[:1], ["dog"], length=77)[0]
    with collect_maps(pipe, ["dog"], propagate="none") as ours:
        pipe(PROMPTS[0], latents=latents, **STEPS)
    found = []
    for kind in (ReferenceStore, DaamStore):
        with torch.no_grad(), kind(pipe) as store:
            pipe(PROMPTS[0], latents=latents, **STEPS)
        found.append(masks(store.class_maps(select, 64)[None]))
    layers = {"0": 3, "1": 3}  # one layer down and two up at each level
    mean = sum(count * bicubic(ours.levels[key][0], 16) for key, count in layers.items()) / sum(layers.values())
    assert iou(found[0], masks(ours.class_maps(MAPS))) >= 0.98
    assert iou(found[1], masks(mean[None])) >= 0.98


def test_the_peer_has_our_maps(tiny_sd, latents, ours, select):
    with torch.no_grad(), PeerMaps(tiny_sd) as store:
        tiny_sd(PROMPTS, latents=latents, **STEPS)
    store.compute()
    theirs = store.class_maps(select, 8)
    assert (theirs - ours.class_maps(MAPS)).abs().max() < 0.05
    assert iou(masks(theirs), masks(ours.class_maps(MAPS))) >= 0.98


def test_the_references_mask_follows_the_image():
    image = np.full((48, 48, 3), 40, np.uint8)
    image[10:38, 14:34] = 220
    truth = image[..., 0] > 100
    y, x = np.mgrid[:48, :48]
    blob = np.exp(-(((y - 24) / 14) ** 2 + ((x - 24) / 10) ** 2)).astype(np.float32)
    mask = reference_mask(blob, image, blob > 0.35)
    assert np.array_equal(mask, truth) and not np.array_equal(blob > 0.35, truth)


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DiffuMaskError, match="attention_map_diffusers is not installed: pip install --no-deps"):
        baselines.needs("attention_map_diffusers")
    with pytest.raises(DiffuMaskError, match="xformers is not installed"):
        plain_attention(None, "xformers")


def test_plain_attention_is_the_pipelines_own(tiny_sd, latents):
    before = tiny_sd(PROMPTS[0], latents=latents[:1], **STEPS).images
    plain_attention(tiny_sd, "sdpa")
    assert torch.equal(tiny_sd(PROMPTS[0], latents=latents[:1], **STEPS).images, before)
    with pytest.raises(DiffuMaskError, match="no plain attention flash"):
        plain_attention(tiny_sd, "flash")
