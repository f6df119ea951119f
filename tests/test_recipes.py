"""docs/recipes.md: its commands run, one after another, with all of their flags and small values."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_samples import STAGES, tiny_model
from pages import ROOT, blocks, lines, words
from PIL import Image
from transformers import (
    ResNetBackbone,
    ResNetConfig,
    SegformerConfig,
    SegformerForImageClassification,
    SwinBackbone,
    SwinConfig,
)
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.learning.segmenters import new_segmenter

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = {part.partition("\n")[0]: part for part in re.split("^## ", PAGE, flags=re.MULTILINE)[1:]}
SEEN = [
    "car",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]  # here all of VOC: mini knows them
SMALL = {"--num": "32", "--steps": "2", "--size": "64x64", "--batch-size": "4", "--dtype": "fp32", "--device": "cpu"}
FROM_HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "mini",
    "nvidia/mit-b2": "mit",
    "microsoft/resnet-50": "resnet",
    "microsoft/swin-base-patch4-window12-384-in22k": "swin",
}
CLASSES = {"voc": ",".join(SEEN), "person,rider,car,truck,bus,train": "person,car,bus,train"}


def shrunk(command: list[str]) -> list[str]:
    """Return a command with the same flags, and values that a test can wait for."""
    small = [FROM_HUB.get(word, word) for word in command]
    for index, flag in enumerate(small[:-1]):
        if flag in SMALL or flag == "--classes":
            small[index + 1] = SMALL.get(flag) or CLASSES.get(small[index + 1], small[index + 1])
    return small


def run(recipe: str) -> list[list[str]]:
    """Run what a recipe shows in the current folder; return its commands, as the page has them."""
    said = []
    for block in blocks(recipe):
        if block.startswith("from "):
            for name, here in FROM_HUB.items():
                block = block.replace(f'"{name}"', f'"{here}"')
            exec(block, {})
        elif commands := [command for line in lines(block) if (command := words(line))]:
            assert len(commands) == len(lines(block)), block
            for command in commands:
                result = CliRunner().invoke(app, shrunk(command))
                assert result.exit_code == 0, (shrunk(command), result.output, result.exception)
                said.append(command)
        else:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            subprocess.run(["bash", "-euc", block], env={**os.environ, "PATH": path}, check=True, timeout=120)
    return said


def write_pair(image: Path, mask: Path, values: int, seed: int) -> None:
    """Write an image of noise, and a mask of blocks of the numbers 0 to values - 1."""
    noise = np.random.default_rng(seed)
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(image)
    Image.fromarray(noise.integers(0, values, (8, 12), dtype=np.uint8).repeat(8, 0).repeat(8, 1)).save(mask)


@pytest.fixture
def brought(tmp_path, monkeypatch) -> Path:
    """Go to a folder with what a reader brings: VOC (of eight classes), Cityscapes and ADE20K."""
    monkeypatch.chdir(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    for split in ("train", "val"):
        for number in range(3):
            name, seed = f"{split}_{number}", 10 * len(split) + number
            write_pair(voc / f"JPEGImages/{name}.jpg", voc / f"SegmentationClass/{name}.png", len(SEEN) + 1, seed)
            city = [tmp_path / "cityscapes" / kind / split / "ulm" for kind in ("leftImg8bit", "gtFine")]
            names = f"ulm_{number}_leftImg8bit.png", f"ulm_{number}_gtFine_labelIds.png"
            write_pair(city[0] / names[0], city[1] / names[1], 34, seed)
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{split}_{number}\n" for number in range(3)))
    (voc / "labelmap.txt").write_text("".join(f"{name}:::\n" for name in ["background", *SEEN]))
    ade = tmp_path / "ADEChallengeData2016"
    for number in range(3):
        name = f"validation/ADE_val_{number:08}"
        write_pair(ade / f"images/{name}.jpg", ade / f"annotations/{name}.png", 151, number)
    small = dict(depths=[1] * 4, hidden_sizes=[16, 16, 32, 32])
    SegformerForImageClassification(
        SegformerConfig(**small, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16)
    ).save_pretrained("mit")
    ResNetBackbone(ResNetConfig(**small, embedding_size=16, layer_type="basic", **STAGES)).save_pretrained("resnet")
    SwinBackbone(
        SwinConfig(image_size=32, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, **STAGES)
    ).save_pretrained("swin")
    return tmp_path


def check(folder: Path, *names: str) -> list[str]:
    """Run recipes one after another, with small segmenters to start from; return the names of their commands."""
    for start in ("start-r50", "start-swin-b"):
        tiny_model("mask2former", folder / start)
    return [command[0] for name in names for command in run(RECIPES[name])]


def test_ade20k(brought):
    assert check(brought, "ADE20K") == ["generate", "generate", "filter", "train", "evaluate"]
    assert (brought / "ade-worst.png").exists()


@pytest.mark.slow
def test_voc_and_zero_shot_and_what_is_nearer_to_the_paper(brought):
    names = check(brought, "VOC 2012", "Zero-shot VOC", "Nearer to the paper")
    assert names.count("evaluate") == 4 and names[-2:] == ["affinity", "augment"]


@pytest.mark.slow
def test_cityscapes(brought):
    assert check(brought, "Cityscapes").count("evaluate") == 2


@pytest.mark.slow
def test_domain_generalisation(brought):
    assert check(brought, "Domain generalisation").count("evaluate") == 3


@pytest.mark.slow
def test_what_all_of_them_need(brought):
    assert len(run(RECIPES["What all of them need"])) == 4
    assert json.loads(Path("options.json").read_text())
    for kind, here, start in ((ResNetBackbone, "resnet", "start-r50"), (SwinBackbone, "swin", "start-swin-b")):
        segmenter = new_segmenter(start, {0: "background", 1: "dog"}, 64)
        encoder = segmenter.model.model.pixel_level_module.encoder.state_dict()
        own = kind.from_pretrained(here, out_indices=(1, 2, 3, 4)).state_dict()
        assert own.keys() == encoder.keys() and all(torch.equal(own[name], encoder[name]) for name in own)


def test_each_recipe_is_run():
    tested = "What all of them need,VOC 2012,Cityscapes,ADE20K,Zero-shot VOC,Domain generalisation,Nearer to the paper"
    assert list(RECIPES) == tested.split(",")


def test_only_values_are_made_small():
    command = "generate out --model owner/name --classes voc --num 60000 --captions voc --num=7".split()
    assert shrunk(command) == [
        *"generate out --model owner/name --classes".split(),
        CLASSES["voc"],
        "--num",
        "32",
        "--captions",
        "voc",
        "--num=7",
    ]
