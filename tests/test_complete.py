import json
import shutil

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.complete import as_argument, load_models
from diffumask_fast.models.find import find_model
from diffumask_fast.models.loading import load_pipe

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def load(folder):
    return load_pipe(find_model(folder), torch.float32, CPU)


def change(part, edit):
    """Rewrite the weights of a component."""
    file = next(part.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_whole_folder_loads_as_diffusers_loads_it(tiny_folder):
    ours, theirs = load(tiny_folder), DiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    for name in PARTS:
        one, other = (getattr(pipe, name).state_dict() for pipe in (ours, theirs))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert not getattr(ours, name).training


@pytest.mark.parametrize("name", PARTS)
def test_a_tensor_that_is_missing_is_named(copy, name):
    lost = []
    change(copy / name, lambda tensors: lost.append(sorted(tensors)[2]) or tensors.pop(lost[0]))
    with pytest.raises(DiffuMaskError) as error:
        load(copy)
    assert str(error.value) == f"{copy / name} lacks {lost[0]}: fetch the model again."


def test_an_empty_file_is_refused(copy):
    change(copy / "text_encoder", dict.clear)
    with pytest.raises(DiffuMaskError, match=r"text_encoder lacks .*, .*, .* and \d+ more: fetch"):
        load(copy)


@pytest.mark.parametrize("name", PARTS)
def test_a_tensor_that_no_layer_takes_is_named(copy, name):
    change(copy / name, lambda tensors: tensors.update({"beyond.weight": torch.ones(2)}))
    with pytest.raises(DiffuMaskError, match=f"{name} holds, beyond what config.json asks for, beyond.weight: fetch"):
        load(copy)


@pytest.mark.parametrize("name", PARTS)
def test_another_shape_is_named(copy, name):
    key = []

    def halve(tensors):
        key.append(next(k for k in sorted(tensors) if tensors[k].ndim == 2 or tensors[k].ndim == 4))
        tensors[key[0]] = tensors[key[0]][:1].clone()

    change(copy / name, halve)
    with pytest.raises(DiffuMaskError, match=f"{name} has other shapes than config.json asks for in {key[0]}: fetch"):
        load(copy)


def test_a_configuration_of_fewer_layers_is_refused(copy):
    file = copy / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(DiffuMaskError, match="text_encoder holds, beyond what config.json asks for, .*layers"):
        load(copy)


def test_weights_that_come_only_in_fp16_are_loaded(copy):
    for name in PARTS:
        file = next((copy / name).glob("*.safetensors"))
        save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_suffix(".fp16.safetensors"))
    pipe = load(copy)
    truth = load_file(next((copy / "unet").glob("*.safetensors")))
    assert all(torch.equal(value, truth[key].float()) for key, value in pipe.unet.state_dict().items())


def test_the_names_of_older_weights_are_known(tmp_path):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path)

    def rename(tensors):
        for key in list(tensors):
            for new, name in old.items():
                if new in key:
                    tensors[key.replace(new, name)] = tensors.pop(key)
        assert any(".query." in key for key in tensors)

    change(tmp_path, rename)
    (tmp_path / "model_index.json").write_text(json.dumps({".": ["diffusers", "AutoencoderKL"]}))
    loaded = load_models(tmp_path, torch.float32)["."]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in vae.state_dict().items())


def test_a_tokenizer_without_words_is_refused(copy):
    (copy / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(DiffuMaskError, match="diffusers cannot load"):
        load(copy)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DiffuMaskError, match="tokenizer knows no word of 'a photo of a dog on the grass'"):
        load(copy)


def test_a_tokenizer_without_a_length_is_refused(copy):
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(DiffuMaskError, match="has no model_max_length up to 77"):
        load(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    file = copy / "tokenizer" / "vocab.json"
    vocab = json.loads(file.read_text())
    file.write_text(json.dumps(vocab | {f"beyond{i}</w>": len(vocab) + i for i in range(50_000)}))
    with pytest.raises(DiffuMaskError, match="tokens and its text encoder knows .*: the two are of different models"):
        load(copy)


@pytest.mark.parametrize(("version", "name"), [("0.37.0", "torch_dtype"), ("0.42.0", "dtype"), ("1.0.0.dev0", "dtype")])
def test_a_dtype_has_the_name_that_the_library_takes(monkeypatch, version, name):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert as_argument(torch.float16) == as_argument(torch.float16, AutoencoderKL) == {name: torch.float16}
    assert as_argument(torch.float16, transformers.CLIPTextModel) == {"dtype": torch.float16}
