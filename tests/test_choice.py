import copy
import importlib.machinery

import pytest
import torch
from diffusers.models.attention_processor import XFormersAttnProcessor

from diffumask_fast import DiffuMaskError, DiffuMaskPipeline
from diffumask_fast.attention import choice
from diffumask_fast.attention.choice import attention_of, check_attention, set_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "given, words",
    [
        (("flash", "torch", CUDA), "no attention flash: use sdpa or xformers"),
        (("xformers", "onnx", CUDA), "`engine=onnx` has an attention of its own: use `attention=sdpa`"),
        (("xformers", "torch", CPU), "the device is cpu: use `attention=sdpa`"),
        (("xformers", "torch", CUDA), r"not installed: pip install 'diffumask-fast\[gpu\]', or use `attention=sdpa`"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(monkeypatch, given, words):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(DiffuMaskError, match=words):
        check_attention(*given)


def test_what_can_be_had_is_not_refused(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    check_attention("xformers", "torch", CUDA)
    check_attention("sdpa", "onnx", CPU)


def test_nothing_is_loaded_for_an_attention_that_cannot_be_had(tmp_path):
    with pytest.raises(DiffuMaskError, match="CUDA alone"):
        DiffuMaskPipeline.from_pretrained(tmp_path / "no model", device="cpu", attention="xformers")


def test_xformers_that_does_not_work_is_one_sentence(sd_parts, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DiffuMaskError, match="xformers does not work here .*: use `attention=sdpa`") as caught:
        set_attention(sd_parts["unet"], "xformers")
    assert "\n" not in str(caught.value)


def test_the_attention_of_a_unet_is_told_by_its_layers(sd_parts):
    unet = copy.deepcopy(sd_parts["unet"])
    before = unet.attn_processors
    set_attention(unet, "sdpa")
    assert unet.attn_processors == before and attention_of(unet) == "sdpa"
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(XFormersAttnProcessor())
    assert attention_of(unet) == "xformers"


@pytest.mark.gpu
def test_the_real_one_draws_the_same_masks():
    pytest.importorskip("xformers")
    drawn = []
    for attention in ("sdpa", "xformers"):
        pipe = DiffuMaskPipeline.from_pretrained("mini", device="cuda", attention=attention)
        assert attention_of(pipe.pipe.unet) == attention
        out = pipe(["a photo of a dog on the grass"], [["dog"]], seeds=[1], num_inference_steps=4)
        drawn.append(torch.from_numpy(out.masks) == 12)
    both, either = (drawn[0] & drawn[1]).sum(), (drawn[0] | drawn[1]).sum()
    assert both > 0 and both / either >= 0.95
