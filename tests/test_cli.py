import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from samples import contents

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))
QUICK = ["--steps", "2", "--device", "cpu"]


def call(*arguments, code=0):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stdout[-500:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr
    return done


def refused(*arguments):
    """Run a command that must fail: exit code 1 and one sentence on stderr."""
    text = call(*arguments, code=1).stderr.strip()
    assert text and "\n" not in text and len(text) < 600, text
    return text


def rows_of(folder):
    return [row for path in sorted((folder / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    summary = json.loads(call("generate", out, "--num", 7, "--shard-size", 3, "--seed", 5, "--json", *QUICK).stdout)
    return out, summary


def test_generate_writes_images_and_masks(finished):
    out, summary = finished
    rows = rows_of(out)
    assert summary["images"] == len(rows) == 7 and summary["accepted"] == sum(row["accepted"] for row in rows)
    seconds = summary["seconds"]
    assert summary["images_per_s"] > 0 and seconds.keys() == {"denoise", "decode", "masks", "encode", "write", "all"}
    assert min(seconds.values()) > 0 and sum(seconds.values()) <= 2 * seconds["all"]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "data", "dataset.json", "preview.png"]
    assert len(list((out / "data").iterdir())) == 3
    assert [row["key"] for row in rows][:2] == ["aeroplane-000000", "bird-000000"]


def test_a_finished_run_is_left_alone(finished):
    out, _ = finished
    before = contents(out)
    again = json.loads(call("generate", out, "--num", 7, "--shard-size", 3, "--seed", 5, "--json", *QUICK).stdout)
    assert again["drawn"] == 0 and again["images"] == 7 and contents(out) == before
    text = call("generate", out, "--num", 7, "--shard-size", 3, "--seed", 5, *QUICK).stdout
    assert f"of 7 images accepted, complete: nothing was left to draw. Look at {out / 'preview.png'}." in text


def test_a_changed_option_is_named(finished):
    out, _ = finished
    before = contents(out)
    text = refused("generate", out, "--num", 7, "--shard-size", 3, "--seed", 6, *QUICK)
    assert "seed" in text and "5" in text and "6" in text
    assert "threshold" in refused(
        "generate", out, "--num", 7, "--shard-size", 3, "--seed", 5, "--threshold", "0.4", *QUICK
    )
    assert contents(out) == before


def test_a_run_killed_twice_ends_with_the_same_bytes(finished, tmp_path):
    out = tmp_path / "out"
    command = [PROGRAM, "generate", str(out), "--num", "7", "--shard-size", "3", "--seed", "5", *QUICK]
    for shards in (1, 2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(out.glob("data/*.parquet"))) < shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(out.glob("data/*.parquet"))) >= shards
    call(*command[1:])
    reference, killed = contents(finished[0]), contents(out)
    assert killed == reference


def test_the_closing_line_says_which_limit_rejects_everything(tmp_path):
    limits = ["--min-quality", 1, "--min-area", 0, "--max-area", 1]
    text = call("generate", tmp_path / "out", "--num", 2, "--classes", "dog", *limits, *QUICK).stdout
    assert "0 of 2 images accepted" in text and "To accept more, lower --min-quality." in text
    text = call("remask", tmp_path / "out", tmp_path / "new", *limits).stdout
    assert "0 of 2 images accepted. To accept more, lower --min-quality." in text
    assert "lower --min-quality" in call("remask", tmp_path / "out", tmp_path / "kept", "--min-area", 0).stdout
    assert "To accept more" not in call("remask", tmp_path / "out", tmp_path / "all", "--min-quality", 0).stdout


def test_two_classes_per_image(tmp_path):
    out = tmp_path / "out"
    call("generate", out, "--num", 3, "--classes-per-image", 2, "--classes", "dog,car", *QUICK)
    rows = rows_of(out)
    assert all(len(row["class_ids"]) == 2 and " and " in row["prompt"] for row in rows)
    assert {row["key"].rsplit("-", 1)[0] for row in rows} == {"dog+car", "car+dog"}


def test_json_is_all_of_stdout(finished):
    assert set(finished[1]) >= {"images", "images_per_s", "accepted", "seconds"}
    done = call("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["works"]["embedded model"] == "works" and "torch" in report["versions"]


def test_without_a_terminal_there_is_no_progress_bar(tmp_path):
    done = call("generate", tmp_path / "out", "--num", 1, "--classes", "dog", *QUICK)
    assert done.stderr == "" and "1 images accepted" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--classes", "zebra"], ["zebra", "aeroplane", "train"]),
        (["--size", "60x60"], ["60", "multiple of 8"]),
        (["--size", "big"], ["HxW"]),
        (["--attention", "flash"], ["no attention flash", "sdpa or xformers"]),
        (["--attention", "xformers"], ["CUDA alone", "use --attention sdpa"]),
        (["--attention", "xformers", "--engine", "compile"], ["--engine compile", "use --attention sdpa"]),
        (["--num", "0"], ["--num", "1"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--threshold", "high"], ["otsu", "adaptive"]),
        (["--threshold", "2"], ["threshold"]),
        (["--refine", "sharp"], ["guided", "crf", "none"]),
        (["--min-quality", "2"], ["--min-quality must be a number from 0 to 1"]),
        (["--scheduler", "nonsense"], ["nonsense", "ddim"]),
        (["--batch-size", "many"], ["many"]),
        (["--dtype", "fp8"], ["fp8"]),
        (["--engine", "warp"], ["warp"]),
        (["--classes", "dog", "--classes-per-image", "2"], ["2", "classes"]),
        (["--steps", "0"], ["--steps must be a whole number from 1 to 1000"]),
        (["--lora", "no.safetensors"], ["there is no LoRA no.safetensors: give --lora a file"]),
        (["--lora", __file__], ["test_cli.py is no file of safetensors", "pickle"]),
        (["--lora", "a.safetensors", "--lora", "a.safetensors:0"], ["--lora must be PATH_OR_HUB[:SCALE]"]),
        (
            ["--lora", "a.safetensors", "--engine", "onnx"],
            ["the weights of --engine onnx are fixed: use --engine torch or compile with --lora"],
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, arguments, words):
    text = refused("generate", tmp_path / "out", "--device", "cpu", *arguments)
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_pickled_and_half_written_models_are_refused(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = next((model / "unet").glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-9])
    assert "cut off" in refused("generate", tmp_path / "out", "--model", model)
    weights.unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(data)
    assert "pickle" in refused("generate", tmp_path / "out", "--model", model)


def test_a_class_that_no_prompt_can_hold(tiny_folder, tmp_path):
    (tmp_path / "classes.txt").write_text(f"21,thing,{'x' * 90}\n")
    text = refused("generate", tmp_path / "out", "--model", tiny_folder, "--classes", tmp_path / "classes.txt")
    assert "77" in text


@pytest.mark.skipif(os.name != "posix", reason="paths that cannot be written are POSIX's here")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("generate", tmp_path / "file" / "out", "--num", 1, *QUICK)
    assert "cannot" in refused("generate", "/proc/out", "--num", 1, *QUICK).lower()


def test_a_model_that_draws_black_is_stopped(tmp_path):
    from safetensors.torch import load_file, save_file

    from diffumask_fast import mini

    model = shutil.copytree(mini.folder(), tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    last = max(
        (n for n in tensors if n.startswith("decoder") and n.endswith("weight")), key=lambda n: int(n.split(".")[2])
    )
    tensors[last].zero_()
    tensors[last.replace("weight", "bias")].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    text = refused("generate", tmp_path / "out", "--model", model, "--num", 4, *QUICK)
    assert "rejected" in text and not list((tmp_path / "out").rglob("*.parquet"))


def test_an_unknown_flag_is_wrong_usage(tmp_path):
    assert "There is no flag --nope" in call("generate", tmp_path, "--nope", code=2).stderr


def test_masks_of_a_plain_model_folder(tiny_folder, tmp_path):
    out = tmp_path / "out"
    call(
        "generate",
        out,
        "--model",
        tiny_folder,
        "--classes",
        "dog,cat",
        "--num",
        2,
        "--size",
        "64x96",
        "--guidance-scale",
        1,
        *QUICK,
    )
    rows = rows_of(out)
    assert [row["key"] for row in rows] == ["dog-000000", "cat-000000"] and np.prod(rows[0]["map_sizes"]) > 0


def test_what_an_export_cannot_be_is_one_sentence(tmp_path):
    out = tmp_path / "engine"
    assert "--to must be one of onnx, tensorrt, tensorrt-rtx" in refused("export", "mini", out, "--to", "coreml")
    assert "use --to tensorrt or --to tensorrt-rtx" in refused("export", "mini", out, "--refittable")
    assert "[onnx,tensorrt]" in refused("export", "mini", out, "--to", "tensorrt")
    assert "is no exported engine" in refused("export", tmp_path, out, "--refit", "mini")
    assert "--min-size must be HxW" in refused("export", "mini", out, "--min-size", "64")
    assert "multiples of 32" in refused("export", "mini", out, "--min-size", "80x128")
    assert "needs --engine-path" in refused("generate", tmp_path / "run", "--engine", "onnx")
    assert list(tmp_path.iterdir()) == []
