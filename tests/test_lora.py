"""models/lora.py: LoRA files in a run, fused as diffusers fuses them, known by their bytes."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import constants
from loras import write_lora
from safetensors.torch import load_file, save_file
from test_generation import options as usual_options
from test_generation import silent

from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.verify import verify
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import Job, make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions, RebuildOptions
from diffumask_fast.generation.rebuild import rebuild
from diffumask_fast.models.lora import absolute_text, find_loras, lora_texts, split_scale
from diffumask_fast.pipeline import DiffuMaskPipeline

PROMPT = "a photo of a dog on the grass"


def options(out, model, **changes):
    return usual_options(out, model, num=2, shard_size=2, steps=1, **changes)


@pytest.fixture
def loras(tiny_sd, tmp_path):
    """Two files: one of UNet and text encoder, one of the UNet."""
    folder = tmp_path / "loras"
    folder.mkdir()
    return [
        write_lora(folder / "style.safetensors", tiny_sd, encoder=True),
        write_lora(folder / "pose.safetensors", tiny_sd, seed=5),
    ]


def image(pipe):
    return pipe(PROMPT, ["dog"], seeds=[3], num_inference_steps=2, output_type="np").images


def test_texts():
    assert split_scale("a/b.safetensors:0.5") == ("a/b.safetensors", 0.5)
    assert split_scale("owner/name") == ("owner/name", 1.0) and split_scale("x:-1e-1") == ("x", -0.1)
    assert split_scale("c:/d.safetensors") == ("c:/d.safetensors", 1.0)
    assert lora_texts(Path("a") / "b") == lora_texts([Path("a/b")]) == ("a/b",)
    assert GenerateOptions("out", lora="a:2").lora == ("a:2",) and GenerateOptions("out", lora=["a", "b"]).lora == (
        "a",
        "b",
    )


@pytest.mark.parametrize("text", ["", ":0.5", "a:0", "a:nan", "a:inf", 3, None])
def test_what_is_no_lora_s_text(text):
    for given in (text, [text]):
        with pytest.raises(DiffuMaskError, match="`lora` must be PATH_OR_HUB"):
            DiffuMaskPipeline.from_pretrained(device="cpu", lora=given)
    with pytest.raises(
        DiffuMaskError, match=r"`lora` must be PATH_OR_HUB\[:SCALE\], with a finite number other than 0"
    ):
        GenerateOptions("out", lora=[text])


def test_images_are_those_of_diffusers_and_no_layer_is_left(tiny_folder, loras, tmp_path):
    pytest.importorskip("peft")
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for file, name in zip(loras, ("style", "pose"), strict=True):
        plain.load_lora_weights(file, adapter_name=name)
    plain.set_adapters(["style", "pose"], [0.8, -0.5])
    plain.set_progress_bar_config(disable=True)
    given = dict(num_inference_steps=2, output_type="np")
    unfused = plain(PROMPT, generator=torch.Generator().manual_seed(3), **given).images
    plain.fuse_lora()
    truth = plain(PROMPT, generator=torch.Generator().manual_seed(3), **given).images
    texts = [f"{loras[0]}:0.8", f"{loras[1]}:-0.5"]
    pipe = DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=texts)
    pipe.pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPT, ["dog"], generator=torch.Generator().manual_seed(3), **given)
    assert np.array_equal(drawn.images, truth) and np.abs(truth - unfused).max() < 1e-4
    bare = DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu")
    assert np.abs(drawn.images - image(bare)).max() > 0.01
    assert {type(layer) for layer in pipe.pipe.unet.modules()} == {type(layer) for layer in bare.pipe.unet.modules()}
    record = drawn.provenance
    assert record["lora"] == ["style.safetensors:0.8", "pose.safetensors:-0.5"]
    assert {len(value) for value in record["lora_sha256"].values()} == {64} and "lora" not in bare.info.lora_record
    pipe.save_pretrained(tmp_path / "fused")
    assert np.array_equal(image(DiffuMaskPipeline.from_pretrained(tmp_path / "fused", device="cpu")), image(pipe))


def spoil(file, factor=2.0):
    """Multiply a file's LoRA, under the same name."""
    tensors = load_file(file)
    save_file({name: factor * tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def test_a_run_is_finished_with_the_files_that_began_it(tiny_folder, loras, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    asked = options(out, tiny_folder, lora=[f"{loras[0]}:0.5", str(loras[1])])
    assert run_generate(asked, silent)["drawn"] == 2
    record = json.loads((out / "dataset.json").read_text())
    assert record["options"]["lora"] == ["style.safetensors:0.5", "pose.safetensors:1.0"]
    assert "peft" in record["environment"] and str(tmp_path) not in json.dumps(record)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in loras]
    assert list(record["options"]["lora_sha256"].values()) == digests
    remask(out, tmp_path / "remasked")
    for folder in (out, tmp_path / "remasked"):
        card = (folder / "README.md").read_text()
        for name, scale, digest in zip(("style", "pose"), (0.5, 1.0), digests, strict=True):
            words = f"| LoRA in it | <code>{name}.safetensors</code>, scale {scale}, SHA-256 <code>{digest}</code>"
            assert words in card
    monkeypatch.chdir(loras[0].parent)
    same = options(out, tiny_folder, lora=["style.safetensors:.5", "pose.safetensors"])
    assert run_generate(same, silent)["drawn"] == 0
    with pytest.raises(DiffuMaskError, match="`lora` was .* and is not set now"):
        run_generate(options(out, tiny_folder), silent)
    spoil(loras[1])
    with pytest.raises(DiffuMaskError, match="the SHA-256 of the LoRA pose.safetensors was [0-9a-f.]+ and is .* now"):
        run_generate(asked, silent)


@pytest.mark.slow
def test_a_sample_is_drawn_again_from_the_files_that_drew_it(tiny_folder, loras, tmp_path):
    pytest.importorskip("peft")
    out, key, where = tmp_path / "out", "dog-000000", dict(model=str(tiny_folder), device="cpu")
    run_generate(options(out, tiny_folder, lora=[f"{loras[0]}:0.5", str(loras[1])]), silent)
    assert not verify(out)["faults"]
    with pytest.raises(DiffuMaskError, match="drawn with the LoRA style.safetensors: say by `lora` where it is now"):
        rebuild(out, key, RebuildOptions(**where))
    assert rebuild(out, key, RebuildOptions(**where, lora=list(map(str, loras))))["equal"]
    with pytest.raises(DiffuMaskError, match="drawn with 2 LoRA files, and `lora` names 1"):
        rebuild(out, key, RebuildOptions(**where, lora=[str(loras[0])]))
    with pytest.raises(DiffuMaskError, match="records the scales of its LoRA files: leave that of .*:0.7 out"):
        rebuild(out, key, RebuildOptions(**where, lora=[f"{loras[0]}:0.7", str(loras[1])]))
    spoil(loras[1])
    with pytest.raises(
        DiffuMaskError, match="the LoRA pose.safetensors is not the file that drew .*: name that one by"
    ):
        rebuild(out, key, RebuildOptions(**where, lora=list(map(str, loras))))


def test_a_job_has_its_files(tiny_folder, loras, tmp_path):
    pytest.importorskip("peft")
    asked = options(tmp_path / "out", tiny_folder, lora=f"{loras[1]}:0.25")
    job = make_job(asked, open_pipe(asked, "cpu"))
    again = Job.from_json(json.loads(json.dumps(job.as_json())))
    assert again == job and again.lora == (f"{loras[1]}:0.25",)
    assert again.open("cpu").info.loras == job.loras
    loras[0].rename(loras[1])
    with pytest.raises(DiffuMaskError, match="the LoRA pose.safetensors is not the file that the job was made with"):
        again.open("cpu")


def test_what_cannot_be_a_lora_is_one_sentence(tiny_sd, tiny_folder, loras, tmp_path):
    folder, lost = tmp_path / "loras", tmp_path / "nothing"
    lost.mkdir()
    (lost / "style.bin").write_bytes(pickle.dumps({}))
    (lost / "cut.safetensors").write_bytes(loras[0].read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    same = write_lora(tmp_path / "style.safetensors", tiny_sd)
    for text, words in {
        str(lost / "style.bin"): "style.bin is no file of safetensors: .* a pickle, which can run code",
        str(lost / "cut.safetensors"): "cut.safetensors is no whole file of safetensors .*: fetch it again",
        str(tmp_path / "gone.safetensors"): "there is no LoRA .*gone.safetensors: give `lora` a file",
        str(folder): "has 2 files, such as pose.safetensors: give `lora` the one that is meant",
        str(tmp_path / "empty"): r"has no file \*.safetensors",
    }.items():
        with pytest.raises(DiffuMaskError, match=words):
            find_loras([text])
    with pytest.raises(DiffuMaskError, match="names style.safetensors twice: give each file once"):
        find_loras([str(loras[0]), str(same)])
    assert find_loras([str(loras[0])])[0].name == "style.safetensors"


def test_a_lora_that_changes_nothing_or_does_not_fit_is_refused(tiny_sdxl, tiny_folder, loras, tmp_path, caplog):
    pytest.importorskip("peft")
    tensors = load_file(loras[1])
    files = {
        "zero": {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()},
        "other": {n.replace("attentions", "motions"): t for n, t in tensors.items()},
        "wide": {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in tensors.items()},
        "none": {"a.weight": torch.ones(2)},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path, metadata={"format": "pt"})
        words = "changes nothing of" if name == "zero" else "does not fit"
        with pytest.raises(DiffuMaskError, match=f"the LoRA {name}.safetensors ({words}) this model"):
            DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=str(path))
    assert not caplog.text
    some = tmp_path / "some.safetensors"
    save_file({n.replace("mid_block", "middle"): t for n, t in tensors.items()}, some, metadata={"format": "pt"})
    DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=str(some))
    assert "8 of the 80 layers of the LoRA some.safetensors are none of this model's, and are left out" in caplog.text


def test_a_lora_of_which_the_text_encoder_alone_fits_is_refused(tiny_sd, tiny_folder, loras, tmp_path):
    pytest.importorskip("peft")
    tensors = load_file(loras[0])
    other = tmp_path / "other.safetensors"
    save_file({n.replace("unet.", "transformer."): t for n, t in tensors.items()}, other, metadata={"format": "pt"})
    with pytest.raises(DiffuMaskError, match="fits this model's text encoder alone, and 80 of its 84 layers are of"):
        DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=str(other))
    encoder = write_lora(tmp_path / "encoder.safetensors", tiny_sd, unet=False, encoder=True)
    DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=str(encoder))


@pytest.mark.parametrize(("factor", "scale"), [(float("nan"), 1), (1, 1e300)])
def test_a_lora_that_makes_weights_that_are_no_numbers_is_refused(tiny_folder, loras, factor, scale):
    pytest.importorskip("peft")
    spoil(loras[0], factor)
    with pytest.raises(DiffuMaskError, match="cannot fuse style.safetensors .*: leave it out, or give a smaller scale"):
        DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", lora=f"{loras[0]}:{scale}")


def test_engines_fuse_or_refuse(tiny_folder, loras, tmp_path, monkeypatch):
    with pytest.raises(
        DiffuMaskError, match="weights of `engine=onnx` are fixed: use `engine=torch` or compile with `lora`"
    ):
        DiffuMaskPipeline.from_pretrained(tiny_folder, engine="onnx", engine_path=tmp_path, lora=str(loras[0]))


@pytest.mark.parametrize("lacks", ["peft", "accelerate"])
def test_without_peft_the_sentence_says_what_to_install(loras, monkeypatch, lacks):
    monkeypatch.setattr(constants, "USE_PEFT_BACKEND", lacks != "peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DiffuMaskError, match=r"`lora` needs peft \(.*peft.*\): pip install 'diffumask-fast\[lora\]'"):
        find_loras([str(loras[0])])


def test_a_file_of_the_hub(loras, monkeypatch):
    def fetch(repo, file):
        if repo == "owner/gone":
            raise OSError("404\nnot found")
        return str(loras[0].parent / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md", "style.safetensors"])
    [found] = find_loras(["owner/name:0.5"])
    assert (found.name, found.path, found.scale) == ("owner/name/style.safetensors", str(loras[0]), 0.5)
    assert find_loras(["owner/name/pose.safetensors"])[0].name == "owner/name/pose.safetensors"
    with pytest.raises(DiffuMaskError, match="other.bin is no file of safetensors"):
        find_loras(["owner/name/other.bin"])
    (loras[0].parent / "blob").write_bytes(loras[0].read_bytes())  # the hub's cache has links to files without suffix
    (loras[0].parent / "link.safetensors").symlink_to("blob")
    [linked] = find_loras(["owner/name/link.safetensors"])
    [again] = find_loras([f"{linked.path}:{linked.scale}"])
    assert (again.path, again.sha256) == (linked.path, linked.sha256) and linked.path.endswith("link.safetensors")
    assert absolute_text(f"{linked.path}:2") == f"{linked.path}:2.0"
    with pytest.raises(DiffuMaskError, match=r"owner/gone/a.safetensors is neither a LoRA here nor .* the hub \(404\)"):
        find_loras(["owner/gone/a.safetensors"])
