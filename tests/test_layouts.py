"""learning/layouts.py: folders as PASCAL VOC and Cityscapes have them."""

import numpy as np
import pytest
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.data import open_data
from diffumask_fast.prompts.vocabulary import voc_palette

RNG = np.random.default_rng(0)
SHAPE = (24, 40)
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep"
)
VOC = (*VOC.split(), "sofa", "train", "tvmonitor")


def palette_png(path, labels, palette=None, **keywords):
    mask = Image.fromarray(labels)
    mask.putpalette(palette or voc_palette())
    mask.save(path, **keywords)


def voc(folder, masks, images=None, split="train"):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, labels in masks.items():
        palette_png(folder / "SegmentationClass" / f"{name}.png", labels)
        image = (images or {}).get(name, Image.new("RGB", labels.shape[::-1], (10, 200, 30)))
        image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(masks) + "\n")
    return folder


def labels_of(*numbers):
    return RNG.choice(np.array(numbers, np.uint8), SHAPE)


def test_a_voc_folder(tmp_path):
    masks = {"2007_000033": labels_of(0, 1, 20, 255), "2007_000032": labels_of(0, 15)}
    data = open_data(voc(tmp_path, masks))
    assert data.classes == dict(enumerate(("background", *VOC)))
    assert data.names == list(masks) and len(data) == 2
    for index, (name, labels) in enumerate(masks.items()):
        example = data[index]
        assert example.name == name and np.array_equal(example.labels, labels)
        assert np.abs(example.image.astype(int) - (10, 200, 30)).max() < 6


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(tmp_path, mode):
    pixels = np.zeros((*SHAPE, 3), np.uint8)
    pixels[:, :20] = (230, 20, 20) if mode == "CMYK" else 200
    image = Image.fromarray(pixels).convert(mode)
    data = open_data(voc(tmp_path, {"a": labels_of(0, 1)}, {"a": image}))
    with Image.open(tmp_path / "JPEGImages" / "a.jpg") as kept:
        assert kept.mode == mode
    assert data[0].image.shape == (*SHAPE, 3)
    assert np.abs(data[0].image[:, :16].astype(int) - pixels[:, :16]).max() < 12  # a jpeg's edge is not sharp
    assert np.abs(data[0].image[:, 24:].astype(int)).max() < 12


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_images_of_other_suffixes(tmp_path, suffix):
    voc(tmp_path, {"a": labels_of(0, 1)})
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    Image.new("RGB", SHAPE[::-1], "red").save(tmp_path / "JPEGImages" / f"a.{suffix}")
    assert (open_data(tmp_path)[0].image[0, 0] >= (250, 0, 0)).all()


def test_splits_are_named_where_there_are_several(tmp_path):
    voc(tmp_path, {"a": labels_of(0, 1)})
    voc(tmp_path, {"b": labels_of(0, 2), "c": labels_of(0)}, split="val")
    assert open_data(tmp_path, split="val").names == ["b", "c"] and open_data(tmp_path, split="train").names == ["a"]
    with pytest.raises(DiffuMaskError, match="a `split` must be named of .*Segmentation: it has train, val"):
        open_data(tmp_path)
    with pytest.raises(DiffuMaskError, match="there is no split test of .*: it has train, val"):
        open_data(tmp_path, split="test")
    with pytest.raises(DiffuMaskError, match="there is no split ../Segmentation/val"):
        open_data(tmp_path, split="../Segmentation/val")


def test_lists_that_are_empty_missing_or_lead_elsewhere(tmp_path):
    lists = voc(tmp_path, {}) / "ImageSets" / "Segmentation"
    with pytest.raises(DiffuMaskError, match="train.txt names no image"):
        open_data(tmp_path)
    for name in ("../../secret", "a/b", ".."):
        (lists / "train.txt").write_text(name)
        with pytest.raises(DiffuMaskError, match="is no name of a file"):
            open_data(tmp_path)
    (lists / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DiffuMaskError, match="train.txt cannot be read"):
        open_data(tmp_path)
    (lists / "train.txt").unlink()
    with pytest.raises(DiffuMaskError, match="a `split` must be named of .*it has none"):
        open_data(tmp_path)


@pytest.mark.parametrize("gone", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_missing_files_are_found_when_data_are_opened(tmp_path, gone):
    voc(tmp_path, {"a": labels_of(0, 1), "b": labels_of(0, 1)})
    (tmp_path / gone).unlink()
    with pytest.raises(DiffuMaskError, match=f"{gone} is missing: bring it back, or take b out of the split"):
        open_data(tmp_path)


@pytest.mark.parametrize("part", ["JPEGImages/a.jpg", "SegmentationClass/a.png", "SegmentationClass", "ImageSets"])
def test_links_are_not_followed(tmp_path, part):
    voc(tmp_path / "voc", {"a": labels_of(0, 1)})
    (tmp_path / "voc" / part).rename(tmp_path / "elsewhere")
    (tmp_path / "voc" / part).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiffuMaskError, match=f"{part} is a link, and links in data are not followed"):
        open_data(tmp_path / "voc")
    (tmp_path / "voc" / part).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "voc" / part)
    (tmp_path / "link").symlink_to(tmp_path / "voc")
    assert len(open_data(tmp_path / "link")) == 1


def test_ids_outside_the_map_sizes_and_all_ignored(tmp_path):
    masks = {"a": labels_of(0, 21), "b": labels_of(0, 1), "c": np.full(SHAPE, 255, np.uint8)}
    data = open_data(voc(tmp_path, masks, {"b": Image.new("RGB", (24, 40))}))
    with pytest.raises(DiffuMaskError, match="mask of a holds 21, which is no class of the data"):
        data[0]
    with pytest.raises(DiffuMaskError, match="image of b has 40x24 pixels and its mask 24x40"):
        data[1]
    assert (data[2].labels == 255).all()


def test_masks_that_would_be_read_wrongly(tmp_path):
    labels, path = labels_of(0, 1, 12), tmp_path / "SegmentationClass" / "a.png"
    data = open_data(voc(tmp_path, {"a": labels}))
    order = [12, 1, 0, *range(3, 256)]  # colours sorted anew: number 0 is the dog's
    palette = np.array(voc_palette()).reshape(256, 3)[order].ravel().tolist()
    palette_png(path, labels, palette)
    with pytest.raises(DiffuMaskError, match="has the colour of class 12 as number 0: write it as VOC does"):
        data[0]
    Image.fromarray(labels_of(0, 1)).save(path)
    assert data[0].labels.max() == 1  # grey of 8 bits: the values are the ids
    Image.fromarray(labels_of(0, 1) * 255).convert("1").save(path)
    with pytest.raises(DiffuMaskError, match="is PNG of mode 1: masks are PNG of class ids"):
        data[0]
    Image.fromarray(labels).save(path, format="JPEG")
    with pytest.raises(DiffuMaskError, match="is JPEG of mode L"):
        data[0]
    path.write_bytes(four_bit_grey(np.tile(np.array([0, 1], np.uint8), (24, 20))))
    with pytest.raises(DiffuMaskError, match="has 4 bits a pixel: masks have 8, or a palette"):
        data[0]
    path.write_bytes(b"no picture")
    with pytest.raises(DiffuMaskError, match="a.png cannot be decoded"):
        data[0]


def four_bit_grey(values):
    """Return a PNG of grey values with four bits each, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(values[y, 0::2] << 4 | values[y, 1::2]) for y in range(len(values)))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_palettes_of_few_bits_hold_ids(tmp_path):
    labels = labels_of(0, 1, 2)
    data = open_data(voc(tmp_path, {"a": labels}))
    palette_png(tmp_path / "SegmentationClass" / "a.png", labels, voc_palette()[: 3 * 4], bits=2)
    assert np.array_equal(data[0].labels, labels)


def test_masks_that_show_colours(tmp_path):
    labels = labels_of(0, 5, 20, 255)
    data = open_data(voc(tmp_path, {"a": labels}))
    colours = np.array(voc_palette(), np.uint8).reshape(256, 3)[labels]
    Image.fromarray(colours).save(tmp_path / "SegmentationClass" / "a.png")
    assert np.array_equal(data[0].labels, labels)
    colours[3, 4] = 1, 2, 3
    Image.fromarray(colours).save(tmp_path / "SegmentationClass" / "a.png")
    with pytest.raises(DiffuMaskError, match="a.png holds the colour 1,2,3, which is no class"):
        data[0]


def test_classes_of_a_labelmap(tmp_path):
    labels = labels_of(0, 1, 2, 255)
    voc(tmp_path, {"a": labels})
    (tmp_path / "labelmap.txt").write_text(
        "# label:colour:parts:actions\nbackground:0,0,0::\ncup:9,8,7::\nlamp:7,0,0::\n"
    )
    data = open_data(tmp_path)
    assert data.classes == {0: "background", 1: "cup", 2: "lamp"} and np.array_equal(data[0].labels, labels)
    colours = np.array([(0, 0, 0), (9, 8, 7), (7, 0, 0), (224, 224, 192)], np.uint8)[np.minimum(labels, 3)]
    Image.fromarray(colours).save(tmp_path / "SegmentationClass" / "a.png")
    assert np.array_equal(data[0].labels, labels)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("cup:9,8,7::\nbackground:0,0,0::", "background first"),
        ("background:0,0,0::", "one line name:r,g,b:: for each class"),
        ("background:0,0,0::\ncup", "one line name:r,g,b::"),
        ("background:0,0,0::\ncup:a,b,c::", "one line name:r,g,b::"),
        ("background:0,0,0::\ncup:1,2,3::\ncup:2,3,4::", "one line name:r,g,b::"),
        ("background:0,0,0::\ncup:1,2::", "three numbers"),
    ],
)
def test_labelmaps_that_are_none(tmp_path, text, sentence):
    voc(tmp_path, {"a": labels_of(0, 1)})
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(DiffuMaskError, match=sentence):
        open_data(tmp_path)


# Label ids and train ids as Cityscapes publishes them (its scripts' helpers/labels.py), all 34 in order.
TRAIN_IDS = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255]
TRAIN_IDS += [16, 17, 18]


def cityscapes(folder, masks, kind="labelIds", split="val", city="aachen"):
    for name in ("leftImg8bit", "gtFine"):
        (folder / name / split / city).mkdir(parents=True, exist_ok=True)
    for name, labels in masks.items():
        Image.new("RGB", labels.shape[::-1], "red").save(
            folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
        )
        Image.fromarray(labels).save(folder / "gtFine" / split / city / f"{name}_gtFine_{kind}.png")
    return folder


def test_a_cityscapes_folder_by_label_ids_and_by_train_ids(tmp_path):
    labels = np.arange(36, dtype=np.uint8).reshape(4, 9).clip(0, 33)
    labels[-1, -1] = 255
    trained = np.array([*TRAIN_IDS, *[255] * 222], np.uint8)[labels]
    for kind, pixels in (("labelIds", labels), ("labelTrainIds", trained)):
        data = open_data(cityscapes(tmp_path / kind, {"aachen_000000_000019": pixels}, kind))
        example = data[0]
        assert data.names == [example.name] == ["aachen_000000_000019"]
        assert np.array_equal(example.labels, np.where(trained == 255, 255, trained + 1))
        assert example.image.shape == (4, 9, 3)
    assert len(data.classes) == 20 and data.classes[0] == "background" and data.classes[1] == "road"
    assert [data.classes[number] for number in (12, 13, 14, 19)] == ["person", "rider", "car", "bicycle"]


def test_train_ids_are_taken_where_both_are_there(tmp_path):
    cityscapes(tmp_path, {"a": np.full((4, 9), 7, np.uint8)})
    cityscapes(tmp_path, {"a": np.full((4, 9), 18, np.uint8)}, "labelTrainIds")
    assert (open_data(tmp_path)[0].labels == 19).all()


def test_splits_and_cities(tmp_path):
    cityscapes(tmp_path, {"ulm_1": np.full((4, 9), 7, np.uint8)}, city="ulm")
    cityscapes(tmp_path, {"bonn_1": np.full((4, 9), 7, np.uint8)}, city="bonn")
    assert open_data(tmp_path).names == ["bonn_1", "ulm_1"]
    cityscapes(tmp_path, {"jena_1": np.full((4, 9), 7, np.uint8)}, city="jena", split="train")
    with pytest.raises(DiffuMaskError, match="a `split` must be named of .*leftImg8bit: it has train, val"):
        open_data(tmp_path)
    assert open_data(tmp_path, split="train").names == ["jena_1"]
    (tmp_path / "leftImg8bit" / "test").mkdir()
    with pytest.raises(DiffuMaskError, match="test holds no .*_leftImg8bit.png: give another `split`"):
        open_data(tmp_path, split="test")


@pytest.mark.parametrize("kind, number", [("labelIds", 34), ("labelTrainIds", 19)])
def test_numbers_that_cityscapes_does_not_have(tmp_path, kind, number):
    data = open_data(cityscapes(tmp_path, {"a": np.full((4, 9), number, np.uint8)}, kind))
    with pytest.raises(DiffuMaskError, match=f"a_gtFine_{kind}.png holds {number}, which Cityscapes does not have"):
        data[0]


def test_a_cityscapes_mask_that_is_missing_or_a_link(tmp_path):
    cityscapes(tmp_path, {"a": np.full((4, 9), 7, np.uint8)})
    mask = tmp_path / "gtFine" / "val" / "aachen" / "a_gtFine_labelIds.png"
    mask.rename(tmp_path / "mask.png")
    with pytest.raises(DiffuMaskError, match="a_gtFine_labelIds.png is missing"):
        open_data(tmp_path)
    mask.symlink_to(tmp_path / "mask.png")
    with pytest.raises(DiffuMaskError, match="a_gtFine_labelIds.png is a link"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("background:0,0,0::\ncup:9,8,7::\nlamp:9,8,7::", "lamp the colour 9,8,7, which cup has"),
        ("background:0,0,0::\ncup:224,224,192::", "cup the colour 224,224,192, which what is ignored has"),
        ("background:0,0,0::\ncup:::\nlamp:128,0,0::", "lamp the colour 128,0,0, which cup has"),  # VOC's of class 1
        ("background:0,0,0::\ncup:0,0,300::", "three numbers r,g,b from 0 to 255"),
    ],
)
def test_labelmaps_whose_colours_do_not_tell_classes_apart(tmp_path, text, sentence):
    voc(tmp_path, {"a": labels_of(0, 1)})
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(DiffuMaskError, match=sentence):
        open_data(tmp_path)


def test_a_photograph_that_viewers_turn(tmp_path):
    """Whether its mask is turned nobody says; turned by half, both have one size."""
    voc(tmp_path, {"a": labels_of(0, 1)})
    exif = Image.Exif()
    for orientation in (1, 3):
        exif[0x0112] = orientation
        Image.new("RGB", SHAPE[::-1]).save(tmp_path / "JPEGImages" / "a.jpg", exif=exif)
        if orientation == 1:
            assert open_data(tmp_path)[0].image.shape == (*SHAPE, 3)
    with pytest.raises(DiffuMaskError, match="a.jpg is to be turned when it is shown .*: save it as it is to be seen"):
        open_data(tmp_path)[0]


def test_files_of_other_sizes_are_other_data(tmp_path):
    origins = []
    for labels in (labels_of(0, 1), labels_of(0)):
        origins.append(open_data(voc(tmp_path, {"a": labels})).origin)
    assert origins[0] != origins[1] and len(origins[0]) == 1
