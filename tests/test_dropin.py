"""dropin.py: the paper's program's layout, byte for byte what its next scripts read, and its maps."""

import json
import pickletools
import signal
import subprocess
import sys
import time
import warnings
from functools import cache

import next_scripts
import numpy as np
import pytest
import torch
from PIL import Image

from diffumask_fast.dropin import (
    Drawing,
    class_levels,
    draw,
    fuse,
    image_seeds,
    main,
    pack_maps,
    packed_size,
    word_tokens,
)
from diffumask_fast.pipeline import DiffuMaskPipeline

COMMAND = [sys.executable, "-m", "diffumask_fast.dropin"]
QUICK = ["--device", "cpu", "--dtype", "fp32"]


def call(*arguments):
    return main([*map(str, arguments), *QUICK])


def folder_of(out, name, number):
    return out / f"VOC_Multi_Attention_{name}_sub_{number}_NoClipRetrieval_sample"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def load(folder, stem):
    return np.load(folder / "npy" / f"{stem}.npy", allow_pickle=True).item()


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffuMaskPipeline.from_pretrained("mini", device="cpu", dtype="fp32")
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three dogs of two workers, with the record, drawn well enough to have masks."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--classes", "dog", "--thread_num", 2, "--output", out, "--image_number", 3, "--steps", 8, "--record"]
    assert call(*arguments) == 0
    return folder_of(out, "dog", 3), arguments


@pytest.mark.parametrize(
    "number, workers, seeds",
    [
        (4, 1, [200000, 200001, 200002, 200003]),
        (4, 2, [200000, 200001, 200004, 200005]),
        (6, 3, [200000, 200001, 200004, 200005, 200008, 200009]),
        (5, 3, [200000, 200001, 200002, 200003, 200004]),
        (2, 8, [200000, 200002]),
    ],
)
def test_seeds_are_those_of_the_workers(number, workers, seeds):
    assert image_seeds(number, workers) == seeds


@pytest.mark.parametrize("number, workers", [(8000, 8), (8003, 8), (15, 8), (16, 8), (7, 7), (1, 1), (100, 99)])
def test_every_image_has_a_number_and_those_of_the_original_are_among_them(number, workers):
    seeds = image_seeds(number, workers)
    share = number // workers
    original = {200000 + worker * 2 * share + i for worker in range(workers) for i in range(share)}
    assert len(seeds) == len(set(seeds)) == number and original <= set(seeds)


def test_the_layout(finished):
    folder, _ = finished
    stems = [f"image_dog_{number}" for number in (200001, 200002, 200003)]
    assert sorted(contents(folder)) == [
        *(f"npy/{stem}.npy" for stem in stems), "prompts.jsonl", *(f"train_image/{stem}.jpg" for stem in stems)
    ]  # fmt: skip
    for stem in stems:
        image = Image.open(folder / "train_image" / f"{stem}.jpg")
        assert image.size == (512, 512) and image.mode == "RGB" and image.format == "JPEG"
        maps = load(folder, stem)
        assert list(maps) == list(range(20))
        assert {(m.shape, m.dtype, m.flags.writeable) for m in maps.values()} == {((512, 512), np.dtype("f4"), True)}
        assert 0.5 < maps[11].max() <= 1 and not any(maps[key].any() for key in range(20) if key != 11)


def test_prompts_and_seeds_are_recorded(finished, pipe):
    lines = [json.loads(line) for line in (finished[0] / "prompts.jsonl").read_text().splitlines()]
    assert [(line["image"], line["seed"]) for line in lines] == [
        (f"image_dog_{seed + 1}", seed) for seed in (200000, 200001, 200002)
    ]
    assert all(line["class"] == "dog" and " dog " in line["prompt"] for line in lines)
    assert lines[0]["steps"] == 8 and lines[0]["guidance_scale"] == 4 and lines[0]["weights"] == pipe.weights
    again = pipe([lines[1]["prompt"]], seeds=[lines[1]["seed"]], num_inference_steps=8).images[0]
    drawn = Image.open(finished[0] / "train_image" / f"{lines[1]['image']}.jpg").resize(again.size)
    assert np.abs(np.asarray(again, int) - np.asarray(drawn, int)).mean() < 6


def test_a_rerun_redraws_nothing(finished):
    folder, arguments = finished
    before = contents(folder), times(folder)
    assert call(*arguments) == 0 and (contents(folder), times(folder)) == before


def test_old_and_new_numpy_can_read_it():
    data = pack_maps({11: np.ones((512, 512))})
    start = data.index(b"\n") + 1
    opcodes = list(pickletools.genops(data[start:]))
    assert {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"
    }  # fmt: skip
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in opcodes)
    assert opcodes[0][1] <= 4  # Python 3.8's highest is 5, its NumPy's 4


def test_size_without_unpickling(tmp_path):
    one = np.random.default_rng(0).random((512, 512), np.float32)
    sizes = [len(pack_maps({index: one + index for index in indices})) for indices in ([11], [0], [19, 3], range(20))]
    assert sizes == [packed_size(n) for n in (1, 1, 2, 20)] and sizes[0] < 2.2e6
    path = tmp_path / "x.npy"
    path.write_bytes(pack_maps({4: one, 7: one * 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = np.load(path, allow_pickle=True).item()
    assert (maps[4] == one).all() and (maps[7] == one * 2).all() and not maps[0].any()


@pytest.mark.parametrize("damage", ["no npy", "short npy", "no jpg", "short jpg", "empty jpg"])
def test_what_is_missing_or_cut_off_is_drawn_again_and_nothing_else(tmp_path, damage):
    arguments = ["--classes", "cat", "--output", tmp_path, "--image_number", 2, "--steps", 1, "--batch_size", 1]
    assert call(*arguments) == 0
    folder = folder_of(tmp_path, "cat", 2)
    whole, kept = contents(folder), times(folder)
    how, ending = damage.split()
    path = folder / {"npy": "npy", "jpg": "train_image"}[ending] / f"image_cat_200002.{ending}"
    path.unlink() if how == "no" else path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -9])
    assert call(*arguments) == 0
    assert contents(folder) == whole
    assert all(path.stat().st_mtime_ns == kept[path] for path in folder.rglob("*_200001.*"))


def test_a_killed_run_leaves_whole_pairs_and_is_finished_by_the_next(tmp_path):
    arguments = ["--classes", "horse", "--thread_num", "2", "--image_number", "6", "--steps", "6", "--batch_size", "2"]
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    whole, folder = folder_of(tmp_path / "whole", "horse", 6), folder_of(tmp_path / "cut", "horse", 6)
    process = subprocess.Popen([*COMMAND, *arguments, *QUICK, "--output", str(tmp_path / "cut")])
    deadline = time.monotonic() + 120
    while len(list(folder.glob("train_image/*"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    images, maps = ({p.stem: p for p in folder.glob(pattern)} for pattern in ("train_image/*", "npy/*"))
    assert 3 <= len(images) < 6 and images.keys() <= maps.keys()
    assert {p.suffix for p in (*images.values(), *maps.values())} == {".jpg", ".npy"}
    for stem, path in images.items():
        Image.open(path).load()
        assert sorted(load(folder, stem)) == list(range(20))
    kept = {path: path.stat().st_mtime_ns for stem in images for path in (images[stem], maps[stem])}
    (folder / ".image_horse_200009.npy.tmp").write_bytes(b"half")
    assert call(*arguments, "--output", tmp_path / "cut") == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert sorted(contents(folder)) == sorted(contents(whole))
    for stem in (f"image_horse_{number}" for number in (200001, 200002, 200003, 200007, 200008, 200009)):
        assert np.abs(load(folder, stem)[12] - load(whole, stem)[12]).max() < 1e-3


def test_other_settings_and_other_numbers_are_refused(finished, capsys):
    folder, arguments = finished
    before = contents(folder)
    swapped = {"--steps": 7, "--guidance_scale": 3, "--thread_num": 3}
    for flag, words in (
        ("--steps", "steps was 8 and is 7 now"),
        ("--guidance_scale", "guidance_scale was 4.0 and is 3.0 now"),
        ("--thread_num", "image_dog_200002.jpg.*--thread_num"),
    ):
        at = arguments.index(flag) if flag in arguments else None
        changed = (
            [*arguments[: at + 1], swapped[flag], *arguments[at + 2 :]] if at else [*arguments, flag, swapped[flag]]
        )
        assert call(*changed) == 1
        error = capsys.readouterr().err
        assert __import__("re").search(words, error) and error.count("\n") == 1
    assert contents(folder) == before


def test_images_of_another_program_are_not_touched(tmp_path, capsys):
    folder = folder_of(tmp_path, "bus", 1)
    (folder / "train_image").mkdir(parents=True)
    Image.new("RGB", (512, 512)).save(folder / "train_image" / "image_bus_200001.jpg")
    before = contents(folder)
    assert call("--classes", "bus", "--output", tmp_path, "--image_number", 1, "--steps", 1) == 1
    assert "another program" in capsys.readouterr().err and contents(folder) == before
