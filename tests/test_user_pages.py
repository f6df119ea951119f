"""The quick start, and the Python of the pages for users of diffusers and of datasets: they run, with a small model."""

import json
import shutil
from pathlib import Path

import pytest
from pages import FENCED, ROOT, commands
from typer.testing import CliRunner

from diffumask_fast import mini
from diffumask_fast.cli import app
from diffumask_fast.dataset.schema import AUGMENTED_SCHEMA

DOCS = ROOT / "docs"
SMALL = {"--num": "6", "--size": "64x64"}
SHORT = {"generate": ["--steps", "2", "--guidance-scale", "2", "--device", "cpu"], "train": ["--steps", "2"]}


def python_of(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [fence[2] for fence in FENCED.finditer(text) if fence[1] == "python"]


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory) -> tuple[Path, list[str]]:
    """Run the commands of the quick start, with few and small images by a model that takes any word."""
    folder, ran = tmp_path_factory.mktemp("quick"), []
    shutil.copytree(mini.folder(), folder / "sd15", ignore=shutil.ignore_patterns("diffumask.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands((DOCS / "quick-start.md").read_text(encoding="utf-8")):
            small = [SMALL.get(flag, word) for flag, word in zip(["", *words], words, strict=False)]
            result = CliRunner().invoke(app, [*small, *SHORT.get(words[0], [])])
            assert result.exit_code == 0, (small, result.output, result.exception)
            ran.append(words[0])
    return folder, ran


@pytest.mark.slow
def test_the_quick_start_ends_with_a_coco_dataset_of_its_three_classes(quick_start):
    folder, ran = quick_start
    assert sorted(set(ran)) == ["convert", "doctor", "generate", "remask", "report", "train", "verify"]
    instances = json.loads((folder / "out-coco/annotations/instances_train.json").read_text())
    assert [category["name"] for category in instances["categories"]] == ["forklift", "traffic cone", "ladder"]
    assert (folder / "out/report.html").exists() and (folder / "segmenter/segmenter.json").exists()


@pytest.mark.slow
def test_the_python_of_the_page_on_datasets(quick_start, monkeypatch):
    monkeypatch.chdir(quick_start[0])
    blocks = python_of("datasets.md")
    assert len(blocks) == 4
    for block in blocks:
        exec(block, space := {})
    assert set(space["table"].columns) == {"key", "classes", "quality", "accepted", "reason"}


@pytest.mark.slow
def test_the_python_of_the_page_for_diffusers_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in python_of("for-diffusers-users.md"):
        exec(block.replace("path/to/stable-diffusion", str(mini.folder())), space)
    assert (tmp_path / "where.png").exists()
    assert space["mask"].shape == (1, 128, 128) and space["quality"].shape == (1, 2)
    assert space["out"].class_ids == [(12, 21)] and space["out"].masks.shape == (1, 128, 128)


def test_the_columns_on_the_page_are_those_of_a_shard():
    lines = (DOCS / "datasets.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    assert [name.strip("| `") for row in rows for name in row.split(", ")] == AUGMENTED_SCHEMA.names
