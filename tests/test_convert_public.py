"""convert/public.py: datasets with the numbers of public ones, read as the tools of those read them."""

import contextlib
import io
import json

import numpy as np
import pytest
from foreign import converted, dataset, rows_by_name
from PIL import Image
from pycocotools.coco import COCO

from diffumask_fast.convert.options import ConvertOptions
from diffumask_fast.convert.public import numbers_like, public_names
from diffumask_fast.errors import DiffuMaskError

VOCS = {1: "aeroplane", 20: "tvmonitor"}
CITY = {7: "car", 21: "traffic light"}


def test_files_in_cocos_form_have_their_own_numbers_others_have_no_gaps():
    sparse, dense = public_names("coco", "own"), public_names("coco", "compact")
    assert (sparse[90], dense[80], list(dense)) == ("toothbrush", "toothbrush", [*range(81)])
    assert (public_names("cityscapes", "own")[26], public_names("cityscapes", "compact")[14]) == ("car", "car")
    assert public_names("ade20k", "own") == public_names("ade20k", "compact")


def test_a_class_is_found_by_name_phrase_or_synonym():
    classes = {0: "background", 9: "sofa", 30: "Dining_Table", 31: "boss"}
    entries = [{"id": 31, "name": "boss", "phrase": "person"}]
    assert numbers_like("coco", "own", classes, entries) == {0: 0, 9: 63, 30: 67, 31: 1}
    assert numbers_like("voc", "compact", {0: "background", 5: "airplane"}, []) == {0: 0, 5: 1}
    with pytest.raises(DiffuMaskError, match="'gnome' is no class of coco: leave out `like`"):
        numbers_like("coco", "own", {0: "background", 21: "gnome"}, [])
    with pytest.raises(DiffuMaskError, match="'man' and 'woman' are both 'person' of coco"):
        numbers_like("coco", "own", {0: "background", 21: "man", 22: "woman"}, [])


def test_annotations_go_into_one_file_with_cocos(tmp_path):
    source = dataset(tmp_path / "a", classes=VOCS)
    out, rows = converted(source, tmp_path / "b", "coco", like="coco"), rows_by_name(source)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(out / "annotations" / "instances_train.json")
    assert len(coco.cats) == 80 and coco.getCatIds(catNms=["airplane", "tv"]) == [5, 72]
    assert len(coco.getCatIds(supNms=["animal"])) == 10
    for one in coco.loadAnns(coco.getAnnIds(iscrowd=False)):
        row = rows[coco.imgs[one["image_id"]]["file_name"].removesuffix(".png")]
        assert (coco.annToMask(one) == (row.mask == {5: 1, 72: 20}[one["category_id"]])).all()
    panoptic = converted(source, tmp_path / "p", "coco-panoptic", like="coco") / "annotations" / "panoptic_train.json"
    ids = {one["id"]: one["name"] for one in json.loads(panoptic.read_text())["categories"]}
    assert ids == {91: "background"} | {number: name for number, name in public_names("coco", "own").items() if number}


def test_masks_for_mmsegmentation_become_train_ids(tmp_path):
    source = dataset(tmp_path / "a", classes=CITY)
    out, config = converted(source, tmp_path / "b", "mmseg", like="cityscapes"), {}
    exec((out / "dataset_config.py").read_text(), config)
    part = config["train_dataset"]
    names, train = part["metainfo"]["classes"], part["reduce_zero_label"]
    assert train is True and len(names) == 19 == len(part["metainfo"]["palette"])
    for stem, row in rows_by_name(source).items():
        mask = np.array(Image.open(out / "ann_dir" / "train" / f"{stem}.png"))
        seen = {int(number) - 1 for number in np.unique(mask[row.mask == 7])}  # what reduce_zero_label does
        assert seen == {names.index("car")} == {13} and (mask[row.mask == 255] == 255).all()
        assert (mask[row.mask == 21] == names.index("traffic light") + 1).all() and (mask[row.mask == 0] == 0).all()


def test_lists_of_names_are_the_whole_public_list(tmp_path):
    source = dataset(tmp_path / "a", classes=VOCS)
    out = converted(source, tmp_path / "b", "imagefolder", like="coco")
    names = json.loads((out / "classes.json").read_text())
    line = json.loads((out / "train" / "metadata.jsonl").read_text().splitlines()[0])
    assert len(names) == 81 and line["classes"] == ["airplane", "tv"] == [names[n] for n in line["class_numbers"]]
    yolo = converted(source, tmp_path / "c", "yolo", like="coco")
    assert '  4: "airplane"\n' in (yolo / "data.yaml").read_text()
    label = next((yolo / "labels" / "train").iterdir()).read_text()
    assert {line.split()[0] for line in label.splitlines()} == {"4", "62"}
    airplanes = dataset(tmp_path / "d", classes={30: "airplane", 31: "sofa"})
    voc = converted(airplanes, tmp_path / "e", "voc", like="voc")
    assert (voc / "labelmap.txt").read_text().splitlines()[1:3] == ["background:0,0,0::", "aeroplane:128,0,0::"]
    assert set(np.unique(Image.open(next((voc / "SegmentationClass").iterdir())))) == {0, 1, 18, 255}


def test_ids_that_would_pass_for_cocos_are_told(tmp_path, caplog):
    named = {12: "dog", 21: "traffic light"}
    converted(dataset(tmp_path / "a", classes=named), tmp_path / "b", "coco")
    assert "category ids are this dataset's and not COCO's" in caplog.text and "--like coco" in caplog.text
    caplog.clear()
    converted(tmp_path / "a", tmp_path / "c", "coco", like="coco")
    converted(tmp_path / "a", tmp_path / "d", "mmseg")
    converted(dataset(tmp_path / "e", classes={12: "dog", 22: "gnome"}), tmp_path / "f", "coco")
    converted(dataset(tmp_path / "g", classes={18: "dog", 10: "traffic light"}), tmp_path / "h", "coco")
    assert caplog.text == ""


def test_another_list_is_another_conversion(tmp_path):
    source = dataset(tmp_path / "a", classes=CITY)
    converted(source, tmp_path / "b", "coco", like="coco")
    with pytest.raises(DiffuMaskError, match="holds another conversion: `like`"):
        converted(source, tmp_path / "b", "coco", like="cityscapes")
    with pytest.raises(DiffuMaskError, match="VOC's classes alone: leave out `like=coco`"):
        ConvertOptions(source, tmp_path / "c", "reference", like="coco")
