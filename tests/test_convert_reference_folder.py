"""convert/reference_folder.py: the paper's program's folders, as the drop-in writes them, become datasets with maps."""

import json

import numpy as np
import pytest
from foreign import rows_by_name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffumask_fast.convert.import_folder import import_folder
from diffumask_fast.convert.options import ImportOptions
from diffumask_fast.convert.reference_folder import ReferenceFolder
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dropin.class_folder import pack_maps
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions

FOLDER = "VOC_Multi_Attention_dog_sub_8_NoClipRetrieval_sample"


@pytest.fixture
def folder(tmp_path):
    """Two images of a dog: a bright disc, and a map that has its maximum there."""
    out = tmp_path / "DiffMask_VOC"
    for name in ("train_image", "npy"):
        (out / FOLDER / name).mkdir(parents=True)
    y, x = np.mgrid[:512, :512]
    for number in (200001, 200003):
        distance = np.hypot(y - 250, x - number % 100 * 80 - 100)
        image = np.repeat(np.where(distance < 90, 230, 40).astype(np.uint8)[..., None], 3, 2)
        Image.fromarray(image).save(out / FOLDER / "train_image" / f"image_dog_{number}.jpg")
        maps = pack_maps({11: np.exp(-((distance / 90) ** 2)).astype(np.float32)})
        (out / FOLDER / "npy" / f"image_dog_{number}.npy").write_bytes(maps)
    facts = {"image": "image_dog_200003", "class": "dog", "prompt": "a photo of a dog", "seed": 200002}
    (out / FOLDER / "prompts.jsonl").write_text(json.dumps(facts) + "\n")
    return out


def test_maps_and_masks(folder, tmp_path):
    summary = import_folder(ImportOptions(folder, tmp_path / "b", "reference"))
    assert (summary["images"], summary["accepted"]) == (2, 2)
    rows = rows_by_name(tmp_path / "b")
    assert list(rows) == ["image_dog_200001", "image_dog_200003"]
    y, x = np.mgrid[:512, :512]
    for number, row in zip((200001, 200003), rows.values(), strict=True):
        disc = np.hypot(y - 250, x - number % 100 * 80 - 100) < 90
        assert (row.classes, row.class_ids) == (["dog"], [12]) and set(np.unique(row.mask)) == {0, 12}
        assert ((row.mask == 12) & disc).sum() / ((row.mask == 12) | disc).sum() > 0.9
        assert row.maps.shape == (1, 64, 64) and row.maps.max() == 255 and 0 < row.quality[0] <= 1
    assert [(row.prompt, row.seed) for row in rows.values()] == [("", 0), ("a photo of a dog", 200002)]


def test_masks_can_be_made_anew(folder, tmp_path):
    import_folder(ImportOptions(folder / FOLDER, tmp_path / "b", "reference"))
    remask(tmp_path / "b", tmp_path / "same")
    remask(tmp_path / "b", tmp_path / "other", MaskOptions(threshold=0.8))
    first, same, other = (rows_by_name(tmp_path / name)["image_dog_200001"].mask for name in ("b", "same", "other"))
    assert (first == same).all() and 0 < (other == 12).sum() < (first == 12).sum()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_one_sentence(tmp_path, data):
    folder, stem = tmp_path / FOLDER, "image_dog_200001"
    for name in ("train_image", "npy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), "red").save(folder / "train_image" / f"{stem}.jpg")
    np.save(folder / "npy" / f"{stem}.npy", {11: np.eye(16, dtype=np.float32), 14: np.ones((16, 16), np.float32)})
    (folder / "prompts.jsonl").write_text(json.dumps({"image": stem, "prompt": "a dog", "seed": 7}) + "\n")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, min(len(whole) - 1, 900)) | st.integers(0, len(whole) - 1))
    damage = data.draw(st.binary(max_size=9))
    path.write_bytes(whole[:place] + damage + whole[place + data.draw(st.integers(0, 9)) :])
    try:
        source = ReferenceFolder(folder, None, 10**6)
        for index in range(len(source)):
            assert source.head(index).class_ids is not None and source.pixels(index).mask.dtype == np.uint8
    except DiffuMaskError as error:
        assert "\n" not in str(error)


def test_what_is_missing_or_strange_is_one_sentence(folder, tmp_path):
    with pytest.raises(DiffuMaskError, match="holds no train_image"):
        ReferenceFolder(tmp_path / "nothing", None, 10**6)
    with pytest.raises(DiffuMaskError, match="knows no splits"):
        ReferenceFolder(folder, "train", 10**6)
    source = ReferenceFolder(folder, None, 10**6)
    with pytest.raises(DiffuMaskError, match="512x512, more than 1000 pixels"):
        ReferenceFolder(folder, None, 1000).pixels(0)
    np.save(folder / FOLDER / "npy" / "image_dog_200001.npy", {30: np.ones((4, 4), np.float32)})
    with pytest.raises(DiffuMaskError, match="have the number 30: VOC has 20 classes"):
        source.head(0)
    (folder / FOLDER / "npy" / "image_dog_200003.npy").unlink()
    with pytest.raises(DiffuMaskError, match="image_dog_200003.npy is no dictionary of maps"):
        source.head(1)
    for text in ("{half", '"x"', '{"image": "image_dog_200001", "seed": "x"}'):
        (folder / FOLDER / "prompts.jsonl").write_text(text)
        with pytest.raises(DiffuMaskError, match="prompts.jsonl"):
            ReferenceFolder(folder, None, 10**6).head(0)
    (folder / FOLDER / "train_image" / "x.jpg").symlink_to("/etc/passwd")
    with pytest.raises(DiffuMaskError, match="x.jpg is a link"):
        ReferenceFolder(folder, None, 10**6)
