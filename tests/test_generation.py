import contextlib
import dataclasses
import json
import logging
import re
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from samples import contents
from transformers.utils import logging as transformers_logging
from vocabularies import KINDS

from diffumask_fast import pipeline
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.verify import verify
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation import generate, job
from diffumask_fast.generation.generate import run_generate, tell_new_names
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions, PromptOptions, RebuildOptions
from diffumask_fast.generation.probe import run_probe
from diffumask_fast.generation.rebuild import rebuild
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary


@contextlib.contextmanager
def silent(total):
    yield SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)


def options(out, model, **changes):
    settings = dict(model=str(model), classes="dog,cat", num=6, steps=2, shard_size=4, device="cpu", batch_size="2")
    prompts = {one.name: changes.pop(one.name) for one in fields(PromptOptions) if one.name in changes}
    return GenerateOptions(out, prompts=PromptOptions(**prompts), **settings | changes)


def test_a_run_says_which_steps_and_guidance_it_takes_and_why(tiny_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "diffumask_fast")
    bare = options(tmp_path / "out", tiny_folder, steps=None, scheduler="lcm", num=2)
    taken = run_probe(bare)["taken"]
    assert taken == "steps 4 and guidance_scale 1.0, as LCMScheduler is for few steps, with no guidance"
    run_generate(bare, silent)
    recorded = json.loads((tmp_path / "out" / "dataset.json").read_text())["options"]
    assert (recorded["steps"], recorded["guidance_scale"]) == (4, 1.0)
    assert caplog.messages[0] == taken and caplog.records[0].levelno == logging.INFO
    caplog.clear()
    run_generate(options(tmp_path / "turbo", tiny_folder, scheduler="euler-trailing", num=2), silent)
    assert caplog.records[0].levelno == logging.WARNING
    assert re.match("guidance_scale 7.5, as .*; but its timesteps are trailing, .*: if it is one", caplog.messages[0])
    caplog.clear()
    run_generate(options(tmp_path / "all", tiny_folder, scheduler="euler-trailing", num=2, guidance_scale=0), silent)
    assert "guidance" not in caplog.text


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
    with pytest.raises(DiffuMaskError, match="6 of the first 6 images were rejected"):
        run_generate(options(tmp_path / "out", tiny_folder, mask=picky), silent)
    assert not list((tmp_path / "out").rglob("*.parquet"))
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    (tmp_path / "out" / "data" / "shard-00001.parquet").unlink()
    assert run_generate(options(tmp_path / "out", tiny_folder), silent)["drawn"] == 2


def test_small_shards_are_judged_together_and_none_is_written(tiny_folder, tmp_path):
    picky = options(tmp_path / "out", tiny_folder, mask=MaskOptions(min_area=0.999, max_area=1.0), shard_size=1)
    with pytest.raises(DiffuMaskError, match="6 of the first 6.*; lower `min_area`, or check `model`"):
        run_generate(picky, silent)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_one_s_own_limit_that_rejects_everything_is_named(tiny_folder, tmp_path):
    picky = options(tmp_path / "out", tiny_folder, num=3, mask=MaskOptions(min_quality=1.0, min_area=0, max_area=1.0))
    summary = run_generate(picky, silent)
    assert (summary["accepted"], summary["advice"]) == (0, "lower `min_quality`")
    assert run_generate(picky, silent)["advice"] == "lower `min_quality`"
    assert run_generate(options(tmp_path / "b", tiny_folder, num=3), silent)["advice"] == ""


def test_the_scheduler_is_tried_once_and_before_anything_is_written(tiny_folder, tmp_path, monkeypatch):
    tried = []
    for module in (job, pipeline):
        monkeypatch.setattr(module, "try_scheduler", lambda pipe, steps: tried.append(steps) or steps)
    run_generate(options(tmp_path / "out", tiny_folder, num=2), silent)
    assert tried == [2]
    request = plan(Vocabulary.parse("dog"), 1)[0]
    pipe = DiffuMaskPipeline.from_pretrained(str(tiny_folder), device="cpu")
    assert len(list(pipe.stream([request], num_inference_steps=3))) == 1 and tried == [2, 3]


def test_short_memory_is_recorded_and_the_same_command_goes_on_with_it(tiny_folder, tmp_path, monkeypatch, caplog):
    rows = []  # of each call of the UNet: two for an image

    def opened(options, device):
        pipe = job.open_pipe(options, device)

        def note(module, arguments):
            rows.append(arguments[0].shape[0])
            if rows[-1] > 2 and 4 < len(rows) < 8:  # after the first shard: two batches of two steps
                raise torch.OutOfMemoryError("CUDA out of memory")

        pipe.pipe.unet.conv_in.register_forward_pre_hook(note)
        return pipe

    monkeypatch.setattr(generate, "open_pipe", opened)
    out = tmp_path / "out"
    asked = options(out, tiny_folder, num=10)
    assert run_generate(asked, silent)["drawn"] == 10 and rows == [4] * 5 + [2] * 12
    record = json.loads((out / "dataset.json").read_text())
    assert record["drift"] == [{"environment": record["environment"], "batch_size": 1, "shards": [1, 2]}]
    assert record["options"]["batch_size"] == 2
    (warning,) = [entry.getMessage() for entry in caplog.records if "memory is short" in entry.getMessage()]
    assert "from shard 1 on" in warning
    before = contents(out)
    for index in (0, 2):  # the first was drawn in whole batches, and is again
        (out / "data" / f"shard-{index:05d}.parquet").unlink()
    rows[:] = [0] * 8
    assert run_generate(asked, silent)["drawn"] == 6 and rows[8:] == [4] * 4 + [2] * 4
    assert contents(out) == before and len(list(read_rows(out, accepted_only=False))) == 10


def test_the_libraries_speak_again_after_a_run(tiny_folder, tmp_path):
    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    run_generate(options(tmp_path / "out", tiny_folder), silent)
    assert (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()) == before


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(device="gpu"), "no device gpu"),
        (dict(device="mps"), "not supported"),
        (dict(attention="xformers"), "xformers runs on CUDA alone.*use `attention=sdpa`"),
        (dict(size="64"), "HxW"),
        (dict(size="0x64"), "multiple of 8"),
        (dict(classes="../dog"), "cannot"),
    ],
)
def test_bad_numbers_are_one_sentence(tiny_folder, tmp_path, changes, words):
    with pytest.raises(DiffuMaskError, match=words):
        run_generate(options(tmp_path / "out", tiny_folder, **changes), silent)
    assert not (tmp_path / "out").exists()


def test_names_that_voc_does_not_have_are_told(caplog):
    def told(names):
        caplog.clear()
        tell_new_names(Vocabulary.named(names))
        return [record.getMessage() for record in caplog.records]

    assert told(["dog", "cat"]) == []
    assert told(["dgo", "cat"]) == ["not among VOC's classes, drawn as these words: 'dgo' (id 21)"]
    assert told([f"thing {i}" for i in range(9)])[0].endswith("'thing 4' (id 25) and 4 more")


STREET = """
templates = ["a photo of {objects} {scene}"]
scenes = ["on the street"]

[[class]]
name = "hound"
id = 30
phrases = ["dog", "puppy"]
sub_classes = ["red dog", "small puppy"]
colour = "#ff8000"

[[class]]
name = "cat"
"""


def test_a_run_of_a_class_file_needs_the_file_no_more(tiny_folder, tmp_path):
    path = tmp_path / "street.toml"
    path.write_text(STREET)
    asked = options(tmp_path / "out", tiny_folder, classes=str(path), mask=MaskOptions(min_area=0.0, max_area=1.0))
    run_generate(asked, silent)
    rows = list(read_rows(asked.out, accepted_only=False))
    hounds = {row.prompt for row in rows if row.classes == ["hound"]}
    assert hounds == {"a photo of a red dog on the street", "a photo of a small puppy on the street"}
    path.unlink()
    assert verify(asked.out)["faults"] == []
    told = rebuild(asked.out, "hound-000001", RebuildOptions(model=str(tiny_folder), device="cpu"))
    assert told["equal"] and told["fault"] == ""
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    covered = any((row.mask == 30).any() for row in rows)
    assert (sheet == (255, 128, 0)).all(-1).any() == covered
    assert remask(asked.out, tmp_path / "again", MaskOptions(threshold=0.3))["images"] == len(rows)
    assert verify(tmp_path / "again")["faults"] == []


def test_a_model_that_lists_its_classes_is_asked_for_them_alone(tiny_folder, tmp_path):
    pipe = open_pipe(options(tmp_path, tiny_folder), "cpu")
    entries = make_job(options(tmp_path, tiny_folder), pipe).recipe.vocabulary.entries
    assert all(len(entry.sub_classes) > 50 and entry.synonyms for entry in entries)
    pipe.info = dataclasses.replace(pipe.info, classes=("dog", "cat"), scenes={"here": ("dog", "cat")})
    bare = make_job(options(tmp_path, tiny_folder), pipe)
    assert {request.prompt for request in bare.plan(pipe)} == {"a photo of a dog here", "a photo of a cat here"}
    assert bare.options == make_job(options(tmp_path, tiny_folder, sub_classes="none"), pipe).options
    few = make_job(options(tmp_path, tiny_folder, sub_classes="3", num=12), pipe)
    assert len({request.prompt for request in few.plan(pipe)}) == 6


def test_a_phrase_without_tokens_is_one_sentence(tiny_folder, tmp_path):
    asked = options(tmp_path, tiny_folder, classes="犬小屋")
    pipe = open_pipe(asked, "cpu")
    for tokenizer in (pipe.pipe.tokenizer, KINDS["WordPiece"]()):
        pipe.pipe.tokenizer, tokenizer.model_max_length = tokenizer, 77
        with pytest.raises(DiffuMaskError, match="tokenizer has no tokens for '犬小屋': name the class by other words"):
            make_job(asked, pipe).plan(pipe)[0]
    pipe.pipe.tokenizer = KINDS["CLIP"]()  # bytes spell any script
    assert make_job(asked, pipe).plan(pipe)[0].phrases == ("犬小屋",)
