import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.mini.world import ASSETS, HOME, SCENES, VOC, World, _vary, load_sprites


@pytest.fixture(scope="module")
def world():
    return World(load_sprites())


def test_a_scene_depends_on_seed_and_index_alone(world):
    first, again, other = world.scene(3, 5), World(load_sprites()).scene(3, 5), world.scene(3, 6)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert first.prompt == again.prompt
    assert not np.array_equal(first.image, other.image)


def test_the_mask_holds_the_named_classes_and_is_where_the_object_is(world):
    for index in range(24):
        scene = world.scene(1, index)
        assert set(np.unique(scene.mask)) == {0, *(VOC[name].id for name in scene.classes)}
        for name in scene.classes:
            share = (scene.mask == VOC[name].id).mean()
            assert share > 0.01, (index, name, share)


def test_the_mask_is_where_the_object_hides_more_than_half_of_the_background(world, monkeypatch):
    drawn = []
    monkeypatch.setattr("diffumask_fast.mini.world._shadow", lambda rng, image, *_: image)
    for level in (60, 200):
        flat = {name: lambda rng, size, level=level: np.full((size, size, 3), level, np.uint8) for name in SCENES}
        monkeypatch.setattr("diffumask_fast.mini.world.BACKGROUNDS", flat)
        drawn.append([world.scene(2, index) for index in range(8)])
    for dark, bright in zip(*drawn, strict=True):
        assert np.array_equal(dark.mask, bright.mask)
        # 140 levels of difference come through where there is no object, scaled by the light (0.89 to 1.11)
        through = np.abs(bright.image.astype(int) - dark.image).mean(-1)
        assert through[dark.mask > 0].max() < 80 and through[dark.mask == 0].min() > 60
    assert dark.image.shape == (128, 128, 3) and dark.image.dtype == dark.mask.dtype == np.uint8
    assert world.classes == sorted(HOME)


def test_two_objects_are_named_from_left_to_right(world):
    for index in range(12):
        scene = world.scene(4, index, ("dog", "car"))
        columns = [np.nonzero(scene.mask == VOC[name].id)[1].mean() for name in ("dog", "car")]
        assert columns[0] < columns[1]
        assert "a dog and a car" in scene.prompt


def test_a_third_of_the_scenes_has_two_objects_and_some_overlap(world):
    scenes = [world.scene(9, index) for index in range(300)]
    pairs = [scene for scene in scenes if len(scene.classes) == 2]
    assert 0.25 < len(pairs) / len(scenes) < 0.42
    touching = 0
    for scene in pairs:
        left, right = (scene.mask == VOC[name].id for name in scene.classes)
        touching += bool((left[:, :-1] & right[:, 1:]).any() or (left[:-1] & right[1:]).any())
    assert 0.08 < touching / len(pairs) < 0.5


def test_the_side_that_looks_to_the_sun_is_brighter():
    grey = Image.new("RGBA", (64, 64), (128, 128, 128, 255))
    gains = []
    for seed in range(8):
        left, right = (np.asarray(_vary(np.random.default_rng(seed), grey, 48, sun), np.float32) for sun in (-1, 1))
        gain = (right - left)[12:-12, :, 0]
        gains.append((gain[:, -16:-8].mean(), gain[:, 8:16].mean()))
    assert all(right >= 0 >= left for right, left in gains) and np.ptp(np.mean(gains, 0)) > 5, gains


def test_only_permissive_pictures_are_packaged():
    for sprite in load_sprites():
        assert "GPL" not in sprite.licence and "-SA" not in sprite.licence, sprite
    models = {(sprite.name, sprite.model) for sprite in load_sprites()}
    assert {name for name, _ in models} == set(HOME) and len(HOME) == 18
    assert min(sum(name == other for other, _ in models) for name in HOME) >= 3


def test_held_out_objects_are_others_of_the_same_classes(tmp_path):
    kept, held = ({(s.name, s.model) for s in load_sprites(objects=which)} for which in ("kept", "held-out"))
    assert not {model for _, model in kept} & {model for _, model in held}
    assert {name for name, _ in kept} == {name for name, _ in held} == set(HOME)
    lines = ["path,class,model,kind,licence"]
    source = next(path for path in ASSETS.glob("*.webp")).read_bytes()
    for index in range(40):
        (tmp_path / f"{index}.webp").write_bytes(source)
        lines += [f"{index}.webp,{name},{name}/{index},whole,CC0-1.0" for name in HOME]
    (tmp_path / "sprites.csv").write_text("\n".join(lines))
    kept, held = ({s.model for s in load_sprites(tmp_path, objects=which)} for which in ("kept", "held-out"))
    assert not kept & held and len(kept | held) == 40 * len(HOME)
    assert 0.1 < len(held) / (40 * len(HOME)) < 0.3


def test_missing_assets_are_one_sentence(tmp_path):
    with pytest.raises(DiffuMaskError, match="no sprites.csv"):
        load_sprites(tmp_path)
    with pytest.raises(DiffuMaskError, match="no permissive kept cut-out of .*bicycle"):
        load_sprites(names="full")


def test_the_command_writes_a_dataset(tmp_path):
    from diffumask_fast.dataset.reader import read_rows

    out = tmp_path / "world"
    command = [sys.executable, "-m", "diffumask_fast.mini.world", str(out), "--num", "5", "--seed", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(read_rows(out))
    manifest = json.loads((out / "dataset.json").read_text())
    assert len(rows) == 5 and manifest["options"]["seed"] == 8
    assert [entry["name"] for entry in manifest["classes"]] == sorted(HOME)
    scene = World(load_sprites()).scene(8, 2)
    assert np.array_equal(rows[2].mask, scene.mask) and rows[2].prompt == scene.prompt
    again = subprocess.run([*command[:-1], "9"], capture_output=True, text=True)
    assert again.returncode == 1 and "--seed" in again.stderr and "Traceback" not in again.stderr
