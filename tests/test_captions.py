"""generation/captions.py: a run that is drawn from captions of a file."""

import json
import random
from pathlib import Path

import pytest
from samples import contents
from test_generation import options, silent

from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.storage import place
from diffumask_fast.dataset.verify import verify
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation import captions as module
from diffumask_fast.generation.embedding import embed
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.generation.options import PromptOptions, RebuildOptions
from diffumask_fast.generation.probe import run_probe
from diffumask_fast.generation.rebuild import rebuild
from diffumask_fast.masks.options import MaskOptions

SCENES = ("on the grass", "on the street", "and the horse", "and the red bus", "in a box", "of the plant")


def lines(noun, num=12, start=0):
    return [f"the {noun} {SCENES[i % len(SCENES)]} {i}" for i in range(start, start + num)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffumask-fast" / "captions"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "captions.txt"
    texts = [*lines("dog", 30), *lines("cat", 20), *lines("bus", 20), "a dog and a cat", "a dog\0"]
    random.Random(0).shuffle(texts)
    path.write_text("\n".join(texts))
    return path


def prompts(folder):
    return {row.key: row.prompt for row in read_rows(folder, accepted_only=False, columns=["key", "prompt"])}


def asked(out, model, file, **changes):
    return options(out, model, captions=file, **changes)


@pytest.mark.parametrize("retrieval", ["words", "embedding"])
def test_prompts_are_captions_and_the_folder_keeps_them(tiny_folder, tmp_path, file, cache, retrieval, caplog):
    out = tmp_path / "out"
    run = asked(out, tiny_folder, file, retrieval=retrieval, captions_per_class=15)
    summary = run_generate(run, silent)
    assert summary["captions"] == {"cat": 15, "dog": 15} and summary["drawn"] == 6
    for key, prompt in prompts(out).items():
        assert prompt.startswith(f"Photo of the {key.split('-')[0]} "), prompt
    record = json.loads((out / "dataset.json").read_text())["options"]
    assert record["retrieval"] == retrieval and record["captions_per_class"] == 15
    assert record["caption_filter"] == "reference" and len(record["captions"]) == len(record["retrieved"]) == 64
    assert str(tmp_path) not in (out / "captions.jsonl").read_text()
    assert len(list(cache.glob("*"))) == (retrieval == "embedding")
    assert "71 captions; 1 more are not readable text" in caplog.text
    before = contents(out)
    assert run_generate(run, silent)["drawn"] == 0 and contents(out) == before
    assert verify(out)["faults"] == []


def test_the_nearest_captions_are_taken_and_embedded_once(tiny_folder, tmp_path, file, monkeypatch):
    embedded = []
    monkeypatch.setattr(module, "embed", lambda pipe, texts: embedded.append(texts) or embed(pipe, texts))
    run = asked(tmp_path / "a", tiny_folder, file, retrieval="auto", classes="dog")
    pipe = open_pipe(run, "cpu")
    job = make_job(run, pipe)
    found = module.with_captions(job, run.prompts, pipe).recipe.retrieved
    assert found.method == "embedding" and list(map(len, embedded)) == [31, 1] and len(found.captions[0][1]) == 31
    texts = [prompt.removeprefix("Photo of ") for prompt in found.captions[0][1]]
    scores = embed(pipe, texts).astype("float32") @ embed(pipe, ["a photo of a dog"])[0].astype("float32")
    assert (scores[:-1] > scores[1:] - 2e-3).all() and scores[0] > scores[-1] + 2e-3
    del embedded[:]
    fewer = asked(tmp_path / "a", tiny_folder, file, retrieval="embedding", classes="dog", captions_per_class=11)
    assert module.with_captions(job, fewer.prompts, pipe).recipe.retrieved.captions[0][1] == found.captions[0][1][:11]
    assert list(map(len, embedded)) == [1]
    file.write_text(file.read_text() + "\na dog on a box")
    assert len(module.with_captions(job, run.prompts, pipe).recipe.retrieved.captions[0][1]) == 32


def test_a_run_goes_on_where_the_file_is_gone(tiny_folder, tmp_path, file, caplog):
    out = tmp_path / "out"
    run = asked(out, tiny_folder, file)
    run_generate(run, silent)
    before = contents(out)
    for left in ("data/shard-00001.parquet", None):
        file.unlink(missing_ok=True)
        if left is not None:
            (out / left).unlink()
        assert run_generate(run, silent)["drawn"] == 2 * (left is not None) and contents(out) == before
    assert "is gone: the captions that" in caplog.text
    where = RebuildOptions(model=str(tiny_folder), device="cpu")
    assert rebuild(out, "dog-000001", where)["equal"]
    remask(out, tmp_path / "new", MaskOptions(threshold=0.3))
    assert rebuild(tmp_path / "new", "cat-000000", where)["equal"] and verify(tmp_path / "new")["faults"] == []
    with pytest.raises(DiffuMaskError, match="which is no file"):
        run_generate(asked(out, tiny_folder, file, captions_per_class=11), silent)
    (out / "captions.jsonl").write_text((out / "captions.jsonl").read_text() + "\n")
    assert [fault["file"] for fault in verify(out)["faults"]] == ["captions.jsonl"]
    for call in (lambda: run_generate(run, silent), lambda: rebuild(out, "dog-000001", where)):
        with pytest.raises(DiffuMaskError, match=r"captions.jsonl is not what .* was drawn from"):
            call()
    (out / "captions.jsonl").unlink()
    assert [fault["what"] for fault in verify(out)["faults"]] == ["missing"]
    with pytest.raises(DiffuMaskError, match=r"captions.jsonl is missing"):
        run_generate(run, silent)


def test_lost_captions_are_found_again_in_the_file(tiny_folder, tmp_path, file):
    out = tmp_path / "out"
    run_generate(asked(out, tiny_folder, file), silent)
    before = contents(out)
    (out / "captions.jsonl").unlink()
    (out / "data" / "shard-00000.parquet").unlink()
    assert run_generate(asked(out, tiny_folder, file), silent)["drawn"] == 4 and contents(out) == before


def test_a_changed_file_and_changed_options_are_named(tiny_folder, tmp_path, file):
    out = tmp_path / "out"
    run_generate(asked(out, tiny_folder, file), silent)
    before = contents(out)
    text = file.read_text()
    for run, words in (
        (asked(out, tiny_folder, file, retrieval="words"), "`retrieval` was embedding and is words now"),
        (options(out, tiny_folder), "`captions` was .* and is not set now"),
    ):
        with pytest.raises(DiffuMaskError, match=words):
            run_generate(run, silent)
    file.write_text(text + "\na dog")
    with pytest.raises(DiffuMaskError, match="`captions` was .* and is .* now"):
        run_generate(asked(out, tiny_folder, file), silent)
    assert contents(out) == before
    file.write_text(text)
    assert run_generate(asked(out, tiny_folder, file), silent)["drawn"] == 0


def test_captions_of_other_phrases_are_not_kept(tiny_folder, tmp_path, file):
    out, classes = tmp_path / "out", tmp_path / "classes.toml"
    file.write_text("\n".join([*lines("dog", 20), *lines("horse", 20)]))
    for phrase in ("dog", "horse"):  # no shard was written yet, so the run may begin anew
        classes.write_text(f'[[class]]\nname = "animal"\nphrases = ["{phrase}"]\n')
        run_generate(asked(out, tiny_folder, file, classes=str(classes)), silent)
        assert all(prompt.startswith(f"Photo of the {phrase}") for prompt in prompts(out).values())
        for shard in (out / "data").iterdir():
            shard.unlink()


def test_a_file_that_changes_after_it_was_hashed_gives_no_index(tiny_folder, tmp_path, file, cache, monkeypatch):
    hashed = module.CaptionFile.sha256

    def sha256(self):
        value = hashed(self)
        self.path.write_text("\n".join(lines("dog", 40)))
        return value

    monkeypatch.setattr(module.CaptionFile, "sha256", sha256)
    with pytest.raises(DiffuMaskError, match="changed while it was read"):
        run_generate(asked(tmp_path / "out", tiny_folder, file, retrieval="embedding"), silent)
    assert not list(cache.glob("*"))


def test_parts_and_whole_runs_are_the_same_bytes(tiny_folder, tmp_path, file):
    run_generate(asked(tmp_path / "whole", tiny_folder, file), silent)
    run_generate(asked(tmp_path / "parts", tiny_folder, file, part="0/2"), silent)
    file.unlink()
    run_generate(asked(tmp_path / "parts", tiny_folder, file, part="1/2"), silent)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_object_store_keeps_captions_too(tiny_folder, tmp_path, file):
    url = place(f"memory://{tmp_path.name}/captions")
    run_generate(asked(url, tiny_folder, file), silent)
    kept = (url / "captions.jsonl").read_bytes()
    file.unlink()
    assert run_generate(asked(url, tiny_folder, file), silent)["drawn"] == 0 and b"Photo of the dog" in kept


def test_synonyms_in_captions_are_the_class(tiny_folder, tmp_path, file):
    (tmp_path / "classes.toml").write_text(
        '[[class]]\nname = "dog"\nphrases = ["dog", "red horse"]\n[[class]]\nname = "cat"\n'
    )
    file.write_text("\n".join([*(f"two red horses {i}" for i in range(12)), *lines("cat", 20)]))
    out = tmp_path / "out"
    run_generate(asked(out, tiny_folder, file, classes=str(tmp_path / "classes.toml")), silent)
    starts = {key[:3]: prompt[:16] for key, prompt in prompts(out).items()}
    assert starts == {"dog": "Photo of two red", "cat": "Photo of the cat"}
    assert verify(out)["faults"] == []
    assert rebuild(out, "dog-000001", RebuildOptions(model=str(tiny_folder), device="cpu"))["equal"]


def test_classes_with_too_few_captions_take_templates(tiny_folder, tmp_path, file, caplog):
    out = tmp_path / "out"
    file.write_text("\n".join([*lines("dog"), *lines("cat", 9), *lines("horse", 40)]))
    summary = run_generate(asked(out, tiny_folder, file), silent)
    assert summary["captions"] == {"dog": 12} and "fewer than 10 captions fit cat: drawn from templates" in caplog.text
    starts = {key[:3]: prompt[:10] for key, prompt in prompts(out).items()}
    assert starts == {"dog": "Photo of t", "cat": "a photo of"}
    file.write_text("\n".join(lines("horse", 40)))
    with pytest.raises(DiffuMaskError, match="has no 10 captions of any of dog, cat that fit"):
        run_generate(asked(tmp_path / "none", tiny_folder, file), silent)
    assert not (tmp_path / "none").exists()


def test_a_word_past_the_last_token_is_no_caption(tiny_folder, tmp_path, file):
    file.write_text("\n".join([*lines("dog"), *("the " * 90 + f"dog {i}" for i in range(20))]))
    run = asked(tmp_path / "out", tiny_folder, file, classes="dog", caption_filter="none")
    assert run_generate(run, silent)["captions"] == {"dog": 12}
    assert all(prompt.startswith("the dog ") for prompt in prompts(tmp_path / "out").values())


def test_with_two_classes_captions_name_both(tiny_folder, tmp_path, file, caplog):
    file.write_text("\n".join([*(f"a dog and the cat {i}" for i in range(20)), *lines("dog", 40)]))
    run = asked(tmp_path / "out", tiny_folder, file, classes="dog,cat,bus", classes_per_image=2, num=8)
    assert run_generate(run, silent)["captions"] == {"cat+dog": 20}
    assert "1 of the 3 combinations of classes have captions" in caplog.text
    found = prompts(tmp_path / "out")
    for key, prompt in found.items():
        assert prompt.startswith("Photo of a dog and the cat ") == (set(key[:-7].split("+")) == {"dog", "cat"})


def test_rounds_and_a_dry_run_take_captions_too(tiny_folder, tmp_path, file):
    run = asked(tmp_path / "out", tiny_folder, file, num=None, accept_per_class=2)
    assert run_probe(run)["options"]["retrieval"] == "embedding" and not (tmp_path / "out").exists()
    run_generate(run, silent)
    assert all(prompt.startswith("Photo of the ") for prompt in prompts(tmp_path / "out").values())


def test_options_without_a_file_are_refused(tmp_path):
    for changes in ({"retrieval": "words"}, {"captions_per_class": 5}, {"caption_filter": "none"}):
        with pytest.raises(DiffuMaskError, match=f"`{next(iter(changes))}` is of no use without a file of captions"):
            PromptOptions(**changes)
    with pytest.raises(DiffuMaskError, match="local path"):
        PromptOptions(captions=Path("s3://bucket/captions.txt"))
    with pytest.raises(DiffuMaskError, match="one of auto, embedding, words"):
        PromptOptions(captions=tmp_path / "a.txt", retrieval="near")
