"""generation/probe.py: what a run will take, told without writing anything."""

import json
import re
from dataclasses import replace

import pytest
from test_generation import options, silent

from diffumask_fast.cli import app
from diffumask_fast.console import run_program
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.probe import describe, run_probe


def test_the_probe_tells_what_the_run_then_is(tiny_folder, tmp_path):
    asked = options(tmp_path / "out", tiny_folder, num=22)
    told = run_probe(asked)
    assert not list(tmp_path.iterdir())
    run_generate(asked, silent)
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert told["options"] == record["options"] and told["environment"] == record["environment"]
    shards = sorted((tmp_path / "out" / "data").iterdir())
    sizes = [path.stat().st_size for path in shards]
    assert told["shards"] == len(shards) == 6 and told["images"] == told["missing"] == 22
    rows = list(read_rows(tmp_path / "out", accepted_only=False))
    stored = sum(len(row.values[name]["bytes"]) for row in rows for name in ("image", "mask"))
    assert told["bytes"] == pytest.approx(stored, rel=0.1) and told["bytes"] < sum(sizes)
    assert told["bytes_per_shard"] == pytest.approx(told["bytes"] * 4 / 22, rel=0.01)
    assert told["images_per_hour"] * told["hours"] == pytest.approx(22, rel=0.1)
    assert told["seconds"]["all"] >= told["seconds"]["denoise"] > 0 and told["probed"] == 4
    (tmp_path / "out" / "data" / "shard-00002.parquet").unlink()
    assert run_probe(asked)["missing"] == 4
    part = run_probe(replace(asked, part="1/3"))
    assert (part["images"], part["missing"], part["shards"]) == (8, 0, 2)


def test_a_number_of_accepted_images_is_the_least(tiny_folder, tmp_path):
    told = run_probe(options(tmp_path / "out", tiny_folder, num=None, accept_per_class=50))
    assert told["images"] == 100 and told["is_least"]
    lines = list(describe(told))
    assert lines[0].startswith("at least 100 images in at least ") and lines[-1] == "Nothing was written."
    assert re.search(r"^\d+ images/h: at least \d+\.\d\d h for the 100 missing$", lines[1])
    assert re.match(r"a probe of 4 images, in batches of 2: \d accepted$", lines[4])
    assert " in at least 1 shard, by " in next(describe(told | {"shards": 1}))
    assert "  accept_per_class   50" in lines and "  batch_size         2" in lines


def test_the_command_writes_nothing(tiny_folder, tmp_path, capsys):
    def called(*flags):
        command = ["generate", tmp_path / "out", "--model", tiny_folder, "--classes", "dog", "--steps", 2]
        with pytest.raises(SystemExit) as ended:
            run_program(app, list(map(str, [*command, "--batch-size", 1, "--device", "cpu", "--dry-run", *flags])))
        return ended.value.code, capsys.readouterr()

    code, text = called("--json")
    told = json.loads(text.out)
    assert code == 0 and told["images"] == 24 and told["batch_size"] == 1
    code, text = called("--log", tmp_path / "log")
    assert code == 1 and text.err == "a dry run writes nothing: leave out --log\n"
    assert list(tmp_path.iterdir()) == []
