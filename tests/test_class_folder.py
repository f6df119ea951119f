"""dropin/class_folder.py: the files are, byte for byte, what the paper's program's next scripts read."""

import pickletools
import warnings

import numpy as np
import pytest
from PIL import Image
from samples import contents

from diffumask_fast.dropin.class_folder import ClassFolder, pack_maps, packed_head, packed_size
from diffumask_fast.dropin.drawing import Drawing
from diffumask_fast.errors import DiffuMaskError

DRAWINGS = [Drawing("dog", seed, "a photo of a dog", {11: [5]}) for seed in (200000, 200001)]
IMAGE, MAPS = "train_image/image_dog_200001.jpg", "npy/image_dog_200001.npy"


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
    assert all(pack_maps({index: one})[: len(packed_head())] == packed_head() for index in (0, 11, 19))
    assert sizes == [packed_size(n) for n in (1, 1, 2, 20)] and sizes[0] < 2.2e6
    path = tmp_path / "x.npy"
    path.write_bytes(pack_maps({4: one, 7: one * 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = np.load(path, allow_pickle=True).item()
    assert (maps[4] == one).all() and (maps[7] == one * 2).all() and not maps[0].any()


@pytest.fixture
def folder(tmp_path):
    """A folder of two images, both drawn."""
    folder = ClassFolder(tmp_path, "dog", 2, {"steps": 2})
    with folder.locked():
        for drawing in DRAWINGS:
            image = Image.effect_noise((512, 512), 50).convert("RGB")
            folder.write(drawing, image, {11: np.random.default_rng(drawing.seed).random((512, 512), np.float32)})
        folder.record(DRAWINGS)
        assert folder.missing(DRAWINGS) == []
    return folder


@pytest.mark.parametrize("name", [IMAGE, MAPS])
@pytest.mark.parametrize("left", [0, 0.4, None])
def test_what_was_cut_off_or_lost_is_drawn_again(folder, name, left):
    path = folder.path / name
    data = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(data[: int(left * len(data))])
    assert folder.missing(DRAWINGS) == DRAWINGS[:1]


@pytest.mark.parametrize("name", [IMAGE, MAPS])
@pytest.mark.parametrize(
    "foreign",
    [b"my notes", b"\xff\xd8\xff\xe0 other \xff\xd9", pack_maps({})[:80] + b"\x80\x04other", bytes(3 * 10**6)],
)
def test_a_file_of_another_program_is_never_replaced(folder, name, foreign):
    (folder.path / name).write_bytes(foreign)
    before = contents(folder.path)
    with pytest.raises(DiffuMaskError, match="image_dog_200001.(jpg was drawn by|npy was not written by)") as caught:
        folder.missing(DRAWINGS)
    assert "\n" not in str(caught.value) and contents(folder.path) == before


def test_the_paper_s_program_s_maps_stay_where_their_image_is_gone(folder):
    every = {index: np.full((512, 512), index, np.float32) for index in range(20)}
    (folder.path / IMAGE).unlink()
    (folder.path / MAPS).write_bytes(pack_maps(every))  # as that program writes them under its old NumPy
    with pytest.raises(DiffuMaskError, match="npy was not written by this program: move it away"):
        folder.missing(DRAWINGS)


@pytest.mark.parametrize("name", ["", "train_image", "npy", IMAGE, MAPS, "prompts.jsonl"])
def test_links_are_not_followed(folder, tmp_path, name):
    path = folder.path / name if name else folder.path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere") if path.is_dir() else (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(DiffuMaskError, match="is a link|was not written by this program"), folder.locked():
        folder.missing(DRAWINGS)
        folder.record(DRAWINGS)
    assert before == (contents(tmp_path / "elsewhere") if path.is_dir() else (tmp_path / "elsewhere").read_bytes())


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    (folder.path / IMAGE).unlink()
    (folder.path / IMAGE).mkdir()
    with pytest.raises(DiffuMaskError, match="image_dog_200001.jpg is no file: move it away"):
        folder.missing(DRAWINGS)


def test_a_foreign_record_stays(folder):
    record = folder.path / "prompts.jsonl"
    for foreign in ('{"prompt": "mine"}\n', "notes"):
        record.write_text(foreign)
        with pytest.raises(DiffuMaskError, match="prompts.jsonl is there and was not written by this program"):
            folder.record(DRAWINGS)
        assert record.read_text() == foreign


def test_only_our_own_leftovers_are_removed(folder):
    ours = [".image_dog_200001.npy.tmp", ".image_dog_200001.jpg.tmp", ".prompts.jsonl.tmp"]
    for name in (*ours, ".mine.tmp", ".notes.jpg.tmp"):
        (folder.path / name).write_text("half")
    folder.missing(DRAWINGS)
    assert sorted(path.name for path in folder.path.glob(".*")) == [".mine.tmp", ".notes.jpg.tmp"]
