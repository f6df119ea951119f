"""learning/training.py: a training that was killed goes on as if it had not been."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import kill_at
from learning_samples import dataset, tiny_model
from samples import contents
from transformers import SegformerForSemanticSegmentation
from typer.testing import CliRunner

from diffumask_fast.borrow import patched_threads
from diffumask_fast.cli import app
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.options import LearnOptions, TrainOptions, chosen_augmentations
from diffumask_fast.learning.segmenters import load_segmenter
from diffumask_fast.learning.training import falling, train


def options(source: Path, out: Path, start: Path, **keywords) -> TrainOptions:
    learning = LearnOptions(segmenter=str(start), steps=3, batch_size=2, lr=1e-2)
    return TrainOptions(source, out, learning=learning, device="cpu", save_every=1, **keywords)


def two_stages(source: Path, real: Path, start: Path, out: Path) -> None:
    with patched_threads(1):
        train(options(source, out, start, finetune_on=real, finetune_steps=2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return synthetic data, other data, a model to start from (with dropout), and what an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("made")
    source, real = dataset(folder / "source"), dataset(folder / "real", classes="dog,cat")
    start = tiny_model("segformer", folder / "start")
    two_stages(source, real, start, folder / "whole")
    return source, real, start, contents(folder / "whole")


# Files get their names in this order: the state after steps 1 and 2 of the first stage, at its end, and after step 1 of
# the second; then the segmenter's configuration, weights and record.
@pytest.mark.parametrize("call", [1, 3, 4, 6])
def test_killed_and_run_again_it_is_the_same_bit_for_bit(made, tmp_path, call):
    *inputs, whole = made
    kill_at(call, two_stages, *inputs, tmp_path / "out")
    assert "segmenter.json" not in contents(tmp_path / "out")
    two_stages(*inputs, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_what_is_left_is_the_segmenter_alone_and_holds_the_classes_of_both_data(made, tmp_path):
    *_, whole = made
    assert sorted(whole) == ["config.json", "model.safetensors", "segmenter.json"]
    classes = json.loads(whole["segmenter.json"])["classes"]
    assert classes == {"0": "background", "7": "car", "8": "cat", "12": "dog"}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    labels = load_segmenter(tmp_path).model.config.id2label
    assert labels == {0: "background", 1: "car", 2: "cat", 3: "dog"}


def test_run_again_it_is_finished(made, tmp_path):
    source, _, start, _ = made
    first = train(options(source, tmp_path / "out", start))
    before = contents(tmp_path / "out")
    assert train(options(source, tmp_path / "out", start)) == first
    assert contents(tmp_path / "out") == before and first["steps"] == 3 and first["images"] == 4
    changed = options(source, tmp_path / "out", start)
    with pytest.raises(DiffuMaskError, match="holds a training with other options: `seed` was 0 and is 1 now"):
        train(replace(changed, learning=replace(changed.learning, seed=1)))
    with pytest.raises(DiffuMaskError, match="holds data and is no segmenter's folder"):
        train(options(source, source, start))


def test_another_seed_gives_other_weights(made, tmp_path):
    source, _, start, _ = made
    one = options(source, tmp_path / "a", start)
    train(one)
    train(replace(one, out=tmp_path / "b", learning=replace(one.learning, seed=1)))
    first, second = (contents(tmp_path / name)["model.safetensors"] for name in "ab")
    assert first != second


def test_the_random_numbers_of_the_process_are_left_alone(made, tmp_path):
    source, _, start, _ = made
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train(options(source, tmp_path / "out", start))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_learns(tmp_path):
    """Images whose colour is their label, at a glance."""

    def coloured(sample):
        value = sample.request.class_ids[0]
        sample.mask[:], sample.image[:] = 0, 40
        sample.mask[4:20, 10:30], sample.image[4:20, 10:30] = value, (220, 40, 40) if value == 12 else (40, 40, 220)
        return sample

    source = dataset(tmp_path / "data", num=12, change=coloured)
    learning = LearnOptions(segmenter=str(tiny_model("segformer", tmp_path / "start")), steps=60, batch_size=8, lr=1e-2)
    train(TrainOptions(source, tmp_path / "out", learning=learning, device="cpu"))
    made = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), str(source), "--json"])
    assert json.loads(made.stdout)["miou"] > 0.5


def test_one_image_alone_can_be_learnt_though_nothing_can_occlude_it(made, tmp_path):
    source = dataset(tmp_path / "one", num=1, change=lambda sample: replace(sample, accepted=True, reason=""))
    assert train(options(source, tmp_path / "out", made[2]))["images"] == 1


def test_what_is_named_is_augmented_on_the_fly():
    def shares(names: str, images: int = 9) -> tuple[str, float, float, float] | None:
        chosen = chosen_augmentations(LearnOptions(augment=names).augment, images)
        return chosen and (chosen.splice, chosen.blur, chosen.occlude, chosen.perspective)

    assert LearnOptions() == LearnOptions(augment="all")
    assert shares("all") == ("1x2=1/10,2x1=1/10,2x2=3/10", 0.1, 0.5, 0.25)
    assert shares("all", 1) == ("1x2=1/10,2x1=1/10,2x2=3/10", 0.1, 0.0, 0.25)
    assert shares("perspective,blur") == ("none", 0.1, 0.0, 0.25)
    assert shares("none") is None and shares("occlude", 1) is None


def test_learning_rates_rise_and_fall():
    for schedule in ("cosine", "poly"):
        rates = [falling(step, 1000, schedule) for step in range(1000)]
        assert rates[0] < 0.02 and rates[99] == max(rates) > 0.9 and rates[-1] < 0.01
        assert rates[100:] == sorted(rates[100:], reverse=True)
    assert falling(500, 1000, "cosine") == pytest.approx(0.5) and falling(500, 1000, "poly") == pytest.approx(0.5**0.9)


def test_epochs_are_steps(made, tmp_path):
    source, _, start, _ = made
    learning = LearnOptions(segmenter=str(start), epochs=3, batch_size=4)
    assert train(TrainOptions(source, tmp_path / "a", learning=learning, device="cpu"))["steps"] == math.ceil(12 / 4)
    with pytest.raises(DiffuMaskError, match="`steps` and `epochs` say the same thing twice"):
        train(TrainOptions(source, tmp_path / "b", learning=replace(learning, steps=2)))


def test_what_cannot_be_learnt_is_one_sentence(made, tmp_path):
    source, _, start, _ = made
    one = options(source, tmp_path / "out", start)
    with pytest.raises(DiffuMaskError, match="multiples of 32"):
        train(replace(one, learning=replace(one.learning, size=(40, 40))))
    upernet = tiny_model("upernet", tmp_path / "upernet")
    with pytest.raises(DiffuMaskError, match="give a `batch_size` of 2 or more"):
        train(replace(one, out=tmp_path / "u", learning=replace(one.learning, segmenter=str(upernet), batch_size=1)))
    broken = SegformerForSemanticSegmentation.from_pretrained(start)
    torch.nn.init.constant_(broken.decode_head.classifier.bias, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    learning = replace(one.learning, segmenter=str(tmp_path / "broken"))
    data = dataset(tmp_path / "four", classes="dog,car,cat,bus", num=9)  # as many labels as the model has
    with pytest.raises(DiffuMaskError, match="the loss is nan at step 0: use another folder and a smaller `lr`"):
        train(replace(one, data=data, learning=learning))


def test_one_class_alone_can_be_learnt(made, tmp_path):
    _, _, start, _ = made
    source = dataset(tmp_path / "dogs", classes="dog")
    assert train(options(source, tmp_path / "out", start))["classes"] == {"0": "background", "12": "dog"}


def test_train_and_evaluate_as_commands(made, tmp_path):
    source, real, start, _ = made
    out = str(tmp_path / "out")
    words = ["train", str(source), "--out", out, "--segmenter", str(start), "--steps", "2", "--batch-size", "2"]
    trained = CliRunner().invoke(app, [*words, "--json"])
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["folder"] == out
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and "2 steps on 4 images" in again.stdout
    sheet = tmp_path / "worst.png"
    judged = CliRunner().invoke(app, ["evaluate", out, str(source), "--sheet", str(sheet)])
    assert judged.exit_code == 0 and "miou_with_background" in judged.stdout and "predicted as" in judged.stdout
    assert sheet.exists()
