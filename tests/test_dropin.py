"""dropin/: the paper's program's command line and layout, which its next scripts read."""

import json
import re
import signal
import subprocess
import sys
import time

import next_scripts
import numpy as np
import pytest
from PIL import Image
from samples import contents

from diffumask_fast.dropin.class_folder import ClassFolder
from diffumask_fast.dropin.command import main
from diffumask_fast.pipeline import DiffuMaskPipeline

COMMAND = [sys.executable, "-m", "diffumask_fast.dropin"]
QUICK = ["--device", "cpu", "--dtype", "fp32"]


def call(*arguments):
    """Run the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), *QUICK])
    return end.value.code


def folder_of(out, name, number):
    return out / f"VOC_Multi_Attention_{name}_sub_{number}_NoClipRetrieval_sample"


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
    assert lines[0]["steps"] == 8 and lines[0]["guidance_scale"] == 3 and lines[0]["weights"] == pipe.weights
    again = pipe([lines[1]["prompt"]], seeds=[lines[1]["seed"]], num_inference_steps=8).images[0]
    drawn = Image.open(finished[0] / "train_image" / f"{lines[1]['image']}.jpg").resize(again.size)
    assert np.abs(np.asarray(again, int) - np.asarray(drawn, int)).mean() < 6


def test_a_rerun_redraws_nothing(finished):
    folder, arguments = finished
    before = contents(folder), times(folder)
    assert call(*arguments) == 0 and (contents(folder), times(folder)) == before


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
    (folder / ".image_horse_200001.npy.tmp").write_bytes(b"half")
    assert call(*arguments, "--output", tmp_path / "cut") == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert sorted(contents(folder)) == sorted(contents(whole))
    for stem in (f"image_horse_{number}" for number in (200001, 200002, 200003, 200007, 200008, 200009)):
        assert np.abs(load(folder, stem)[12] - load(whole, stem)[12]).max() < 1e-3


def test_other_settings_and_other_numbers_are_refused(finished, capsys):
    folder, arguments = finished
    before = contents(folder)
    for flag, value, words in (
        ("--steps", 7, "steps was 8 and is 7 now"),
        ("--guidance_scale", 4, "guidance_scale was 3.0 and is 4.0 now"),
        ("--thread_num", 3, "image_dog_200002.jpg.*--thread_num"),
    ):
        assert call(*arguments, flag, value) == 1  # the last one counts
        error = capsys.readouterr().err
        assert re.search(words, error) and error.count("\n") == 1
    assert contents(folder) == before


def test_images_of_another_program_are_not_touched(tmp_path, capsys):
    folder = folder_of(tmp_path, "bus", 1)
    (folder / "train_image").mkdir(parents=True)
    Image.new("RGB", (512, 512)).save(folder / "train_image" / "image_bus_200001.jpg")
    before = contents(folder)
    assert call("--classes", "bus", "--output", tmp_path, "--image_number", 1, "--steps", 1) == 1
    assert "another program" in capsys.readouterr().err and contents(folder) == before


def test_a_folder_in_use_is_refused(finished, capsys):
    folder, arguments = finished
    with ClassFolder(folder.parent, "dog", 3, {}).locked():
        assert call(*arguments) == 1
    assert "another run" in capsys.readouterr().err and call(*arguments) == 0


def test_the_original_s_thresholds_and_seeds_run_on_it(finished, tmp_path):
    folder, _ = finished
    cams, images = folder / "npy", folder / "train_image"
    next_scripts.prepare_aff_data(cams, images, tmp_path / "crf")
    refined, out = tmp_path / "refine_gt", tmp_path / "refine_gt_crf"
    refined.mkdir()
    for path in images.iterdir():
        la, ha = (np.load(tmp_path / f"crf_{kind}" / f"{path.stem}.npy") for kind in ("la", "ha"))
        assert la.shape == ha.shape == (21, 512, 512) and la.dtype == np.float32
        a = load(folder, path.stem)[11]
        sure, wide = la.argmax(0) == 12, ha.argmax(0) == 12
        assert 0 < sure.sum() < wide.sum() < 512**2 and a[sure].mean() > a[wide].mean() > a[~wide].mean()
        Image.fromarray((wide * 12).astype(np.uint8)).save(refined / f"{path.stem}.png")
    next_scripts.curve_threshold(cams, images, refined, out)
    assert sorted(p.stem for p in out.iterdir()) == ["image_dog_200001", "image_dog_200002", "image_dog_200003"]
    for path in out.iterdir():
        mask = np.array(Image.open(path))
        assert mask.shape == (512, 512) and set(np.unique(mask)) == {0, 12}


@pytest.mark.parametrize("name, index", [("bicycle", 1), ("diningtable", 10)])
def test_classes_that_the_original_cannot_draw(tmp_path, capsys, name, index):
    assert call("--classes", name, "--output", tmp_path, "--image_number", 1, "--steps", 1) == 0
    said = capsys.readouterr()
    assert f"mini never learnt {name}" in said.err and "1 images, 1 of them drawn now" in said.out
    assert load(folder_of(tmp_path, name, 1), f"image_{name}_200001")[index].max() > 0.5


def test_every_class_of_voc_in_one_command(tmp_path):
    assert call("--classes", "voc", "--output", tmp_path, "--image_number", 1, "--steps", 1) == 0
    for index, name in enumerate(next_scripts.CLASSES):
        maps = load(folder_of(tmp_path, name, 1), f"image_{name}_200001")
        assert maps[index].any() and len(maps) == 20


def test_a_plain_model_is_drawn_with_the_original_s_steps_and_guidance(tiny_folder, tmp_path):
    arguments = ["--model", tiny_folder, "--output", tmp_path, "--image_number", 1, "--record", "--MY_TOKEN", "key"]
    assert call("--classes", "dog", *arguments) == 0
    folder = folder_of(tmp_path, "dog", 1)
    line = json.loads((folder / "prompts.jsonl").read_text())
    assert (line["steps"], line["guidance_scale"], line["model"]) == (50, 7.0, "sd")
    assert Image.open(folder / "train_image" / "image_dog_200001.jpg").size == (512, 512)
    assert load(folder, "image_dog_200001")[11].any()


def test_two_levels_and_two_text_encoders(sdxl_folder, tmp_path):
    arguments = ["--model", sdxl_folder, "--output", tmp_path, "--image_number", 2, "--steps", 1]
    assert call("--classes", "dog,sofa", *arguments) == 0
    for name, index in (("dog", 11), ("sofa", 17)):
        maps = [load(folder_of(tmp_path, name, 2), f"image_{name}_{number}")[index] for number in (200001, 200002)]
        assert all(0.9 < m.max() <= 1 for m in maps) and np.abs(maps[0] - maps[1]).max() > 0.01


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"--classes": "zebra"}, 1, "zebra.*aeroplane.*tvmonitor"),
        ({"--model": "no/such/folder"}, 1, "no/such/folder"),
        ({"--image_number": "0"}, 1, "--image_number must be a whole number from 1 on, not '0'"),
        ({"--thread_num": "-1"}, 1, "--thread_num must be a whole number from 1 on, not '-1'"),
        ({"--steps": "0"}, 1, "--steps must be a whole number from 1 on, not '0'"),
        ({"--guidance_scale": "nan"}, 1, "--guidance_scale must be a number, not 'nan'"),
        ({"--batch_size": "many"}, 1, "many"),
        ({"--dtype": "fp8"}, 1, "fp8"),
        ({"--output": "/proc/out"}, 1, "/proc/out"),
        ({"--image_number": "many"}, 1, "--image_number must be a whole number"),
        ({"--nope": "1"}, 2, "--nope"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, capsys, changes, code, words):
    flags = {"--classes": "dog", "--output": tmp_path / "out", "--image_number": 1} | changes
    arguments = [str(part) for item in flags.items() for part in item]
    with pytest.raises(SystemExit, match=str(code)):
        main(arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, error[-1]) and (code == 2 or len(error) == 1)
    assert not (tmp_path / "out").exists()


def test_help_names_all_flags():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert all(f"--{flag}" in done.stdout for flag in ("classes", "thread_num", "output", "image_number", "model"))


def test_nothing_said_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--classes" in capsys.readouterr().err
