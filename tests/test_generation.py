import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from diffumask_fast import generation
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation import GenerateOptions, run_generate
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.pipeline import DiffuMaskPipeline


@contextlib.contextmanager
def silent(total):
    yield SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)


def options(out, model, **changes):
    settings = dict(model=str(model), classes="dog,cat", num=6, steps=2, shard_size=4, device="cpu", batch_size="2")
    return GenerateOptions(out, **settings | changes)


def test_the_record_holds_resolved_options_and_no_paths(tiny_folder, tmp_path):
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    text = (tmp_path / "out" / "dataset.json").read_text()
    record = json.loads(text)
    assert record["options"]["size"] == "64x64" and record["options"]["classes"] == "dog,cat"
    assert record["options"]["propagate"] == 1 and record["options"]["batch_size"] == 2
    assert record["options"]["attention"] == "sdpa" and "xformers" not in record["environment"]
    assert record["model"]["id"] == tiny_folder.name and len(record["model"]["weights"]) == 64
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert str(tmp_path) not in text and str(tiny_folder.parent) not in text and "auto" not in text


def test_a_run_begun_before_attention_was_an_option_is_finished(tiny_folder, tmp_path):
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    file, shard = tmp_path / "out" / "dataset.json", tmp_path / "out" / "data" / "shard-00001.parquet"
    drawn, older = shard.read_bytes(), file.read_text().replace('    "attention": "sdpa",\n', "")
    file.write_text(older)
    shard.unlink()
    assert run_generate(options(tmp_path / "out", tiny_folder), silent)["drawn"] == 2
    assert file.read_text() == older and "attention" not in older and shard.read_bytes() == drawn


def test_equal_options_spelt_otherwise_are_the_same_run(tiny_folder, tmp_path, monkeypatch):
    first = run_generate(options(tmp_path / "out", tiny_folder), silent)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    monkeypatch.chdir(tiny_folder.parent)
    again = run_generate(
        options(tmp_path / "out", f"./{tiny_folder.name}", classes=str(tmp_path / "classes.txt"), size="64X64"), silent
    )
    assert first["drawn"] == 6 and again["drawn"] == 0


def test_a_rejected_first_batch_stops_a_run_but_not_its_end(tiny_folder, tmp_path):
    picky = MaskOptions(min_area=0.999, max_area=1.0)
    with pytest.raises(DiffuMaskError, match="of the first 4 images were rejected"):
        run_generate(options(tmp_path / "out", tiny_folder, mask=picky), silent)
    assert not list((tmp_path / "out").rglob("*.parquet"))
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    (tmp_path / "out" / "data" / "shard-00001.parquet").unlink()
    assert run_generate(options(tmp_path / "out", tiny_folder), silent)["drawn"] == 2


def test_only_the_first_shard_is_judged(tiny_folder, tmp_path, monkeypatch):
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    (tmp_path / "out" / "data" / "shard-00001.parquet").unlink()
    monkeypatch.setattr(generation, "_check_first_batch", lambda results: pytest.fail("a later shard was judged"))
    assert run_generate(options(tmp_path / "out", tiny_folder), silent)["images"] == 6


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num=0), "--num 0"),
        (dict(seed=-1), "--seed -1"),
        (dict(guidance_scale=float("nan")), "--guidance-scale nan"),
        (dict(device="gpu"), "no device gpu"),
        (dict(device="mps"), "not supported"),
        (dict(attention="xformers"), "xformers draws on CUDA alone.*use --attention sdpa"),
        (dict(size="64"), "HxW"),
        (dict(size="0x64"), "multiple of 8"),
        (dict(classes="../dog"), "cannot"),
    ],
)
def test_bad_numbers_are_one_sentence(tiny_folder, tmp_path, changes, words):
    with pytest.raises(DiffuMaskError, match=words):
        run_generate(options(tmp_path / "out", tiny_folder, **changes), silent)
    assert not (tmp_path / "out").exists()


def test_captions_whose_phrase_is_lost_are_dropped_and_counted(tiny_folder, monkeypatch, tmp_path):
    pipe = DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu")
    settings = options(tmp_path, tiny_folder)
    vocabulary = generation.read_vocabulary(settings, pipe)
    monkeypatch.setattr(pipe.pipe.tokenizer, "model_max_length", 5)
    with pytest.raises(DiffuMaskError, match="no caption fits"):
        generation.make_plan(settings, pipe, vocabulary)
