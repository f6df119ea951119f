from contextlib import nullcontext

import pytest
import torch

from diffumask_fast.attention import processor
from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.bench import memory
from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.geometries import open_geometry
from diffumask_fast.bench.harness import live_tensor_bytes
from diffumask_fast.bench.workspace_memory import workspace

GEOMETRIES = ("mini", pytest.param("sd15", marks=pytest.mark.slow))


def between_steps(contenders, context, attend=None):
    """Return the bytes that live after each step of denoising one image."""
    sizes = []

    def note(pipe, step, timestep, tensors):
        sizes.append(live.now)
        return tensors

    settings = dict(
        contenders.settings, latents=contenders.latents[:1], output_type="latent", callback_on_step_end=note
    )
    with torch.no_grad(), live_tensor_bytes() as live, context:
        if attend is not None:
            attend(live)
        contenders.pipe.pipe(contenders.prompts[:1], **settings)
    return sizes


def record_workspaces(live, monkeypatch):
    """Measure each attention layer's workspace by its shape, and keep the peak of the whole call."""
    plain, seen = processor.attend, {}

    def attend(q, k, v, columns=None, **settings):
        made = columns is not None and settings.get("maps") is None
        before, peak, live.peak = live.now, live.peak, live.now
        result = plain(q, k, v, columns, **settings)
        shape = (q.shape[0], q.shape[1], k.shape[1], settings["heads"], q.shape[2] // settings["heads"])
        shape += (0 if columns is None else columns.shape[2],)
        if not made:
            seen[shape] = live.peak - before
        live.peak = max(peak, live.peak)
        return result

    monkeypatch.setattr(processor, "attend", attend)
    return seen


def test_peak_bytes_counts_what_lives_at_once():
    def call():
        kept = torch.zeros(1000)
        for _ in range(3):
            kept = kept + torch.ones(1000)

    assert memory.peak_bytes(call) == 3 * 4000


def test_ours_is_smaller_and_flat_in_steps():
    pipe = open_geometry("mini", "cpu")
    value, config = memory.against_reference(Contenders(pipe, 1, 1))
    assert value == pytest.approx(config["peak_gib"] / config["reference_peak_gib"], rel=0.02) and value < 0.3
    peaks = dict(memory.over_steps(pipe, (3, 9)))
    assert peaks[9] / peaks[3] <= 1.02


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_between_steps_the_buffers_alone_are_kept_and_a_layers_workspace_is_the_accounts(geometry, monkeypatch):
    contenders, seen = Contenders(open_geometry(geometry, "cpu"), 1, 3 if geometry == "mini" else 2), {}
    plain = between_steps(contenders, nullcontext())
    collector = collect_maps(contenders.pipe.pipe, contenders.phrases[0], propagate=1)
    mapped = between_steps(contenders, collector, lambda live: seen.update(layers=record_workspaces(live, monkeypatch)))
    store = collector.store
    buffers = {key: 4 * maps.numel() for key, maps in store.levels.items()}
    propagated = sum(orders[-1].mean().nbytes for orders in store._propagated.values())
    assert store.num_bytes == 2 * (sum(buffers.values()) + propagated) and propagated
    known = (
        4 * contenders.select[0].numel() + 4 * 77 * contenders.pipe.pipe.unet.config.cross_attention_dim
    )  # of the prompt
    kept = [ours - theirs - known for ours, theirs in zip(mapped, plain, strict=True)]
    assert kept[0] == 2 * sum(buffers.values()) and kept[-1] == store.num_bytes
    names = ("rows", "pixels", "keys", "heads", "head_dim", "num")
    shapes = {shape: workspace("sdpa", **dict(zip(names, shape, strict=True))) for shape in seen["layers"]}
    assert (
        seen["layers"] == shapes and {shape[2] for shape in shapes} > {77} and {shape[5] for shape in shapes} == {0, 1}
    )


@pytest.mark.slow
def test_stable_diffusion_takes_a_tenth_of_the_reference_stores_memory():
    value, config = memory.against_reference(Contenders(open_geometry("sd15", "cpu"), 1, 2))
    assert value <= 0.10 and config["kept_gib"] < 0.001 * config["reference_kept_gib"]
