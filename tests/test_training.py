"""learning/training.py: a training that was killed goes on as if it had not been."""

import copy
import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import kill_at
from learning_samples import dataset, tiny_model
from samples import contents
from transformers import SegformerForSemanticSegmentation
from typer.testing import CliRunner

from diffumask_fast.borrow import patched_threads
from diffumask_fast.cli import app
from diffumask_fast.dataset.derive import derive
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmenter import Augmenter
from diffumask_fast.learning.batches import Batches
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.options import LearnOptions, TrainOptions, chosen_augmentations
from diffumask_fast.learning.segmenters import load_segmenter, new_segmenter, normalised
from diffumask_fast.learning.training import _number, falling, train
from diffumask_fast.masks.options import MaskOptions


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
    torch.nn.init.constant_(broken.decode_head.batch_norm.bias, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    learning = replace(one.learning, segmenter=str(tmp_path / "broken"))
    with pytest.raises(DiffuMaskError, match="the loss is nan and its gradient nan at step 0: use another .*`lr`"):
        train(replace(one, learning=learning))


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
    assert f"Judge it with diffumask-fast evaluate {out} DATA" in again.stdout
    sheet = tmp_path / "worst.png"
    judged = CliRunner().invoke(app, ["evaluate", out, str(source), "--sheet", str(sheet)])
    assert judged.exit_code == 0 and "miou_with_background" in judged.stdout and "predicted as" in judged.stdout
    assert sheet.exists()


def short(source: Path, start: Path, out: Path) -> None:
    """Train fewer steps than after which the state is saved."""
    with patched_threads(1):
        train(replace(options(source, out, start), save_every=200))


# The segmenter's configuration has got its name, then its weights, then its record lacks its name.
@pytest.mark.parametrize("call", [2, 3])
def test_killed_while_the_segmenter_is_written_it_begins_again(made, tmp_path, call):
    source, _, start, _ = made
    short(source, start, tmp_path / "whole")
    kill_at(call, short, source, start, tmp_path / "out")
    assert "config.json" in contents(tmp_path / "out") and "segmenter.json" not in contents(tmp_path / "out")
    short(source, start, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(contents(tmp_path / "whole"))


def test_killed_before_the_last_state_is_removed_it_is_removed(made, tmp_path):
    source, _, start, _ = made
    train(options(source, tmp_path / "out", start))
    (tmp_path / "out" / "checkpoint.safetensors").write_bytes(b"of the step before the last")
    (tmp_path / "out" / ".part").mkdir()
    train(options(source, tmp_path / "out", start))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(contents(tmp_path / "out"))
    assert "checkpoint.safetensors" not in contents(tmp_path / "out")


def test_a_folder_that_takes_nothing_is_found_before_the_training(made, tmp_path):
    source, _, start, _ = made
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part").symlink_to(tmp_path / "nowhere" / "at all")  # root may write in every folder
    with pytest.raises(DiffuMaskError, match="out/.part is no folder: choose another name"):
        train(options(source, tmp_path / "out", start), progress=None)


def test_a_file_system_that_takes_no_more_is_one_sentence(made, tmp_path):
    source, _, start, _ = made
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save_every, words in ((1, "cannot write in .*out"), (200, "cannot write in .*out")):  # the state; the segmenter
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(DiffuMaskError, match=words):
                train(replace(options(source, tmp_path / "out", start), save_every=save_every))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not contents(tmp_path / "out").keys() & {"segmenter.json", "checkpoint.safetensors"}
    assert train(options(source, tmp_path / "out", start))["steps"] == 3


def test_other_masks_under_the_same_names_are_other_data(made, tmp_path):
    """As remask leaves them: another option among those of the dataset."""
    source, _, start, _ = made
    train(options(source, tmp_path / "out", start))
    derive(source, tmp_path / "other", lambda some: (row.values for row in some), MaskOptions(threshold=0.5))
    with pytest.raises(DiffuMaskError, match="holds a training with other options: `data` was"):
        train(options(tmp_path / "other", tmp_path / "out", start))


def test_gradients_that_are_no_numbers_move_no_weights(made, tmp_path, monkeypatch):
    source, _, start, _ = made
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) * math.inf)
    with pytest.raises(DiffuMaskError, match="the loss is [0-9.]+ and its gradient inf at step 0: use another folder"):
        train(options(source, tmp_path / "out", start))
    assert "segmenter.json" not in contents(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_those_of_the_loop_written_out(made, tmp_path, dtype):
    source, real, start, _ = made
    learning = LearnOptions(segmenter=str(start), steps=3, batch_size=2, lr=1e-2, augment="splice,occlude", dtype=dtype)
    with patched_threads(1):
        train(
            TrainOptions(source, tmp_path / "out", finetune_on=real, finetune_steps=2, learning=learning, device="cpu")
        )
        with torch.random.fork_rng():
            expected = written_out(source, real, start, dtype == "bf16").state_dict()
    found = load_segmenter(tmp_path / "out").model.state_dict()
    assert all(torch.allclose(found[name].float(), expected[name].float(), atol=1e-6) for name in expected)


def written_out(source, real, start, half):
    """Return averaged weights after three steps on the first data, and two on the others with a fifth of the rate."""
    torch.manual_seed(0)
    model = new_segmenter(str(start), {0: "background", 7: "car", 8: "cat", 12: "dog"}, 64)
    average, norms = copy.deepcopy(model.model), []
    for stage, (folder, steps, lr) in enumerate(((source, 3, 1e-2), (real, 2, 2e-3))):
        model.model.load_state_dict(average.state_dict())
        model.model.train()
        table = np.full(256, 255)
        table[[0, 7, 8, 12]] = range(4)
        data = open_data(folder)
        augmenter = Augmenter(data, chosen_augmentations("splice,occlude", len(data)), _number(0, stage))
        batches = Batches(data, table, 2, (32, 64), (0, stage), augmenter)
        weights = [part for part in model.model.parameters() if part.ndim > 1]
        rest = [part for part in model.model.parameters() if part.ndim == 1]
        adam = torch.optim.AdamW([{"params": weights, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
        for step in range(steps):
            images, labels = batches[step]
            torch.manual_seed(_number(0, stage, step))
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model.loss(normalised(images), labels)
            adam.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0).item())
            for group in adam.param_groups:
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            adam.step()
            keep = min(0.998, (1 + step) / (10 + step))
            for mean, part in zip(average.parameters(), model.model.parameters(), strict=True):
                mean.data.lerp_(part.data, 1 - keep)
            for mean, part in zip(average.buffers(), model.model.buffers(), strict=True):
                mean.copy_(part)
    assert max(norms) > 1  # some gradients are clipped
    return average
