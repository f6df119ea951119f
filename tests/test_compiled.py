import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw, make_unet, relative
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from fake_cuda import WAITS, fake_cuda
from test_optimized_unet import inputs, same
from test_tap import layers, merge
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.engines import compiled, cuda_graphs
from diffumask_fast.engines.compiled import CompiledDenoiser, compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import native
from diffumask_fast.pipeline import DiffuMaskPipeline


@torch.no_grad()
def test_maps_and_noise_are_the_eager_ones_and_a_smaller_batch_compiles_nothing():
    torch.manual_seed(0)
    unet = make_unet()
    eager, found = UNetWithMaps(unet), CompiledDenoiser(unet)
    counters.clear()
    for images in (3, 3, 2):
        call = dict(
            latents=torch.randn(2 * images, 4, 8, 8), timestep=torch.tensor(500),
            encoder_hidden_states=torch.randn(2 * images, 77, 32), select=torch.rand(images, 77, 2),
            prior={"1": torch.rand(images, 2, 16)},
        )  # fmt: skip
        (noise, maps, propagated), truth = found(UNetCall(**call)), eager(UNetCall(**call))
        assert relative(noise, truth[0]) < 1e-5 and noise.shape == truth[0].shape
        for levels, wanted in ((maps, truth[1]), (propagated, truth[2])):
            assert levels.keys() == wanted.keys() and levels
            assert all(relative(levels[key], wanted[key]) < 1e-5 for key in wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_machine_without_a_compiler_is_told_before_anything_is_drawn(tiny_sd, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    native.library.cache_clear()
    with pytest.raises(DiffuMaskError, match="needs a C\\+\\+ compiler.*`engine=torch`"):
        compile_pipe(tiny_sd)


class Mine(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("kind", [Mine, AttnProcessor])
@pytest.mark.parametrize("name", ["attn1", "attn2"])
def test_a_foreign_processor_is_refused_by_name_before_anything_is_compiled(tiny_sd, kind, name):
    unet = copy.deepcopy(tiny_sd.unet)
    getattr(unet.up_blocks[1].attentions[1].transformer_blocks[0], name).set_processor(kind())
    tiny_sd.unet = unet
    counters.clear()
    with pytest.raises(DiffuMaskError, match=f"`engine=compile` .* has {kind.__name__}: use `engine=torch`"):
        with collect_maps(tiny_sd, ["dog"], denoiser=CompiledDenoiser(unet)):
            draw(tiny_sd, "a dog")
    assert not counters["stats"]


@torch.no_grad()
def test_a_change_that_cannot_be_compiled_is_one_sentence():
    unet = make_unet()
    unet.time_proj.forward = torch._dynamo.disable(unet.time_proj.forward)
    with pytest.raises(DiffuMaskError, match="cannot compile this UNet as it was changed .*: use `engine=torch`$"):
        CompiledDenoiser(unet)(UNetCall(**inputs(unet)))


def traced(unet):
    """Return a compiled denoiser whose graphs run as they were traced: what is asked of tokens is asked there."""
    found = CompiledDenoiser(unet)
    found.model.compile(fullgraph=True, dynamic=False, backend="eager")
    return found


@pytest.mark.parametrize("propagate", ["none", "auto"])
@pytest.mark.parametrize("name", ["attn1", "attn2"])
def test_merged_tokens_say_what_they_say_without_a_compiler(tiny_sd, recording, name, propagate):
    unet = tiny_sd.unet = copy.deepcopy(tiny_sd.unet)
    for attn in layers(unet, name, "fine"):
        merge(attn, 2)
    # one step: attention is right to a few 1e-6 in each layer, and steps add up
    with recording(unet) as recorder:
        plain = draw(tiny_sd, "a dog", steps=1)
    steps = []
    drawn = dict(prompt="a dog", steps=1, callback_on_step_end=lambda *rest: steps.append(1) or rest[-1])
    if (name, propagate) == ("attn1", "none"):
        with collect_maps(tiny_sd, ["dog"], propagate=propagate, denoiser=traced(unet)) as maps:
            assert relative(torch.from_numpy(draw(tiny_sd, **drawn)), torch.from_numpy(plain)) < 1e-5
        truth = recorder.maps(phrase_columns(tiny_sd.tokenizer, ["a dog"], ["dog"], length=77), slice(1, 2))
        assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
        return
    refused = "self-attention of level 0 does not run on" if name == "attn1" else "no cross-attention of level 0 ran on"
    with pytest.raises(DiffuMaskError, match=f"{refused} all of its pixels"):
        with collect_maps(tiny_sd, ["dog"], propagate=propagate, denoiser=traced(unet)):
            draw(tiny_sd, **drawn)
    assert not steps


def test_merged_tokens_of_one_layer_leave_the_mean_of_the_others(tiny_sd, recording):
    unet = tiny_sd.unet = copy.deepcopy(tiny_sd.unet)
    merge(layers(unet, "attn2", "one")[0], 2)
    with recording(unet) as recorder:
        draw(tiny_sd, "a dog")
    with collect_maps(tiny_sd, ["dog"], denoiser=traced(unet)) as maps:
        draw(tiny_sd, "a dog")
    recorder.cross = [p for p in recorder.cross if p.shape[2] != 32]
    truth = recorder.maps(phrase_columns(tiny_sd.tokenizer, ["a dog"], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))


def test_an_engine_path_is_for_other_engines(tmp_path):
    with pytest.raises(DiffuMaskError, match="`engine=compile` takes no `engine_path`"):
        DiffuMaskPipeline.from_pretrained("mini", engine="compile", engine_path=tmp_path)


class ReadAfterWait(TorchDispatchMode):
    """Refuse that the host reads what it has not waited for: that would wait for the whole stream."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS or (self.log and self.log[-1][0] == "wait"), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graphed():
    """Draw by graphs, and give a denoiser, torch's, and what is asked of CUDA."""
    with torch.no_grad(), fake_cuda() as log:
        unet = make_unet()
        yield CompiledDenoiser(unet), UNetWithMaps(unet), log


def asked(log, *names):
    return [entry[0] for entry in log if entry[0] in names]


def later(unet, call):
    """Return the arguments of the next call: the same prompts and phrases, other latents and priors."""
    return inputs(unet, len(call["select"])) | {key: call[key] for key in ("encoder_hidden_states", "select")}


def test_a_graph_for_each_set_of_shapes_gives_what_torch_gives(graphed):
    found, truth, log = graphed
    call = inputs(truth.unet, images=3)
    kept = []
    for step in range(4):
        call = later(truth.unet, call) | ({} if step > 1 else {"prior": {}})
        kept.append((found(UNetCall(**call)), truth(UNetCall(**call))))
    call = inputs(truth.unet, images=2)  # a last batch, with prompts of its own
    kept.append((found(UNetCall(**call)), truth(UNetCall(**call))))
    for results in kept:  # also those of earlier calls: they are not in the graphs' memory
        same(*results)
    captures = [entry for entry in log if entry[0] == "capture"]
    assert len(captures) == 2 and len(asked(log, "replay")) == 5
    pools, streams, modes = ({entry[i] for entry in captures} for i in (2, 3, 4))
    assert len(pools) == len(streams) == 1 and modes == {"thread_local"}
    here = call["latents"].device
    assert [stream.device for stream in streams] == [here]
    assert all(entry[-1] == here for entry in log if entry[0] in ("capture", "replay"))


def test_keys_and_values_are_copied_where_the_prompts_are_others(graphed):
    found, truth, _ = graphed
    call, copies = inputs(truth.unet), []
    for others in (False, False, False, True, True):
        call = inputs(truth.unet) if others else later(truth.unet, call)
        same(found(UNetCall(**call)), truth(UNetCall(**call)))
        copies.append([x._version for pair in found._text for x in pair])
    first = len(found._text) * 2 * [0]
    assert copies == [first, first, first, [1] * len(first), [2] * len(first)]
    with_more_tokens = call | {"encoder_hidden_states": torch.randn(4, 154, 32), "select": torch.rand(2, 154, 3)}
    for given in (with_more_tokens, call):
        same(found(UNetCall(**given)), truth(UNetCall(**given)))


def test_the_host_waits_for_the_answer_about_twins_after_the_replay_alone(graphed):
    found, truth, log = graphed
    call = inputs(truth.unet)
    found(UNetCall(**call))
    for _ in range(3):
        call = later(truth.unet, call)
        log.clear()
        with ReadAfterWait(log):
            results = found(UNetCall(**call))
        assert asked(log, "record", "replay", "wait", "synchronize") == ["record", "replay", "wait"]
        same(results, truth(UNetCall(**call)))


def test_a_wrong_guess_about_twins_is_drawn_again(graphed):
    found, truth, log = graphed
    call = inputs(truth.unet)
    replays = []
    for twins in (True, True, False, False, True, True):
        other = inputs(truth.unet, twins=twins)["latents"]
        log.clear()
        same(found(UNetCall(**call | {"latents": other})), truth(UNetCall(**call | {"latents": other})))
        replays.append([graph for name, graph, *_ in log if name == "replay"])
    twice, plain = replays[0][0], replays[3][0]
    assert twice is not plain
    assert replays == [[twice], [twice], [twice, plain], [plain], [plain], [twice]]


def test_halves_are_twins_by_their_bits():
    half = torch.randn(2, 4, 8, 8)
    half[0, 0, 0, 0] = torch.nan
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one = half.to(dtype).to(memory_format=torch.channels_last)
        other = one.clone()
        assert compiled._equal_halves(torch.cat([one, other]))
        other[1, 3, 7, 7] += 0.5
        assert not compiled._equal_halves(torch.cat([one, other]))


def test_no_map_is_made_where_nothing_is_selected(graphed):
    found, truth, log = graphed
    call = inputs(truth.unet) | {"select": None, "prior": {}, "first_conditional": 2}
    for _ in range(2):
        noise, *levels = found(UNetCall(**call))
        plain = truth.unet(call["latents"], call["timestep"], call["encoder_hidden_states"]).sample
        assert relative(noise, plain) < 1e-5 and levels == [{}, {}]
    assert asked(log, "capture", "replay") == ["capture", "replay", "replay"]


class Adapted(nn.Module):
    """A layer with an adapter beside it, as peft has it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.scaling = base_layer, {"default": 1.0}

    def forward(self, x):
        return self.base_layer(x) * self.scaling["default"]


def change_scaling(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.scaling["default"] = 3.0


def adapt(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_q = Adapted(attn.to_q)


def move(unet):
    unet.conv_out.weight.data = unet.conv_out.weight.data * 2


def replace_norm(unet):
    unet.conv_norm_out = nn.GroupNorm(4, unet.config.block_out_channels[0])


def replace_keys(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_k.weight = nn.Parameter(attn.to_k.weight * 2)


def free_u(unet):
    unet.enable_freeu(0.5, 0.4, 1.5, 2)


def attach(unet):
    unet.conv_in.shift = torch.randn(3)


def test_a_unet_that_has_changed_is_captured_again(graphed):
    found, truth, log = graphed
    call, unet = inputs(truth.unet), truth.unet
    found(UNetCall(**call))
    changes = (adapt, change_scaling, move, replace_norm, replace_keys, free_u, attach, attach)
    for change in changes:
        log.clear()
        change(unet)
        for _ in range(2):
            same(found(UNetCall(**call)), truth(UNetCall(**call)))
        assert asked(log, "synchronize", "capture", "replay") == ["synchronize", "capture", "replay", "replay"]


def test_one_graph_serves_calls_with_and_without_inference_mode(graphed):
    found, truth, log = graphed
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.no_grad():
            call = inputs(truth.unet)
            same(found(UNetCall(**call)), truth(UNetCall(**call)))
    assert asked(log, "capture") == ["capture"]


def test_what_a_graph_would_lose_is_not_drawn_by_one(monkeypatch):
    latents = SimpleNamespace(is_cuda=True)
    with torch.no_grad():
        assert cuda_graphs.runs_as_graph(latents) and not cuda_graphs.runs_as_graph(torch.zeros(1))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not cuda_graphs.runs_as_graph(latents)
    monkeypatch.undo()
    assert not cuda_graphs.runs_as_graph(latents)


def test_a_timestep_on_the_cpu_keeps_its_type():
    for given, dtype in ((7, torch.int64), (7.5, torch.float32), (torch.tensor([7]), torch.int64)):
        found = compiled._scalar(given, torch.device("meta"))
        assert found.shape == () and found.dtype == dtype and found.device.type == "meta"
    there = torch.tensor([3, 3])
    assert compiled._scalar(there, there.device) == 3


def test_a_pipeline_draws_by_graphs_what_it_draws_without(tiny_sd):
    pipe, prompts = copy.deepcopy(tiny_sd), ["a photo of the dog", "a photo of the red cat"]
    with collect_maps(pipe, ["photo"]) as eager:
        images = draw(pipe, prompts, steps=6)
    with fake_cuda() as log:
        denoiser = compile_pipe(pipe).denoiser
        for _ in range(2):
            with collect_maps(pipe, ["photo"], denoiser=denoiser) as maps:
                assert np.abs(draw(pipe, prompts, steps=6) - images).max() < 1e-4
            assert relative(maps.class_maps(), eager.class_maps()) < 1e-4
    # without and with a prior, once for both runs
    assert asked(log, "capture", "replay") == [
        *["capture", *4 * ["replay"]],
        "capture",
        *2 * ["replay"],
        *6 * ["replay"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, iou", [("fp32", 0.99), ("bf16", 0.90)])
def test_mini_draws_the_same_masks(dtype, iou):
    drawn = []
    for engine, its_dtype in (("torch", "fp32"), ("compile", dtype)):
        pipe = DiffuMaskPipeline.from_pretrained("mini", engine=engine, device="cpu", dtype=its_dtype)
        pipe.pipe.set_progress_bar_config(disable=True)
        prompts = ["a photo of a dog on the grass", "a photo of a car on the street"]
        out = pipe(prompts, [["dog"], ["car"]], seeds=[1, 2])
        assert out.provenance["engine"]["name"] == engine
        drawn.append(out.masks > 0)
    both, either = np.logical_and(*drawn).sum((1, 2)), np.logical_or(*drawn).sum((1, 2))
    assert both.min() > 0 and (both / either).mean() >= iou
