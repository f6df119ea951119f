"""prompts/vocabulary.py: what --classes takes."""

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.vocabulary import (
    Vocabulary,
    is_file,
    names_in,
    names_of,
    palette_of,
    phrases_and_ids,
    voc_palette,
)

MINI = Vocabulary.named(["aeroplane", "dog", "cat", "pottedplant"])


def test_voc_is_the_devkits():
    voc = Vocabulary.voc()
    assert voc.ids == tuple(range(1, 21))
    assert voc.names[10] == "diningtable" and voc.phrases[10] == "dining table"
    assert voc["pottedplant"] == ClassEntry(16, "pottedplant", "potted plant")
    assert voc["tvmonitor"].phrase == "tv monitor"


def test_palette_is_vocs():
    palette = voc_palette()
    assert len(palette) == 768
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 12: (64, 0, 128), 20: (0, 64, 128)}
    colours |= {15: (192, 128, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette[3 * index : 3 * index + 3]) for index in colours} == colours


def test_names_keep_voc_ids_and_others_get_new_ones():
    vocabulary = Vocabulary.parse("zebra, dog,fire truck,Potted Plant,犬,हिन्दी")
    assert vocabulary.names == ("zebra", "dog", "fire truck", "pottedplant", "犬", "हिन्दी")
    assert vocabulary.ids == (21, 12, 22, 16, 23, 24)
    assert vocabulary["fire truck"].stem == "fire-truck"


def test_reads_files(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text('\ufeff# my classes\nzebra\n\n21,gnu,"big, hairy  gnu"\ndog\n', "utf-8")
    vocabulary = Vocabulary.parse(str(path))
    assert vocabulary.names == ("zebra", "gnu", "dog")
    assert vocabulary.ids == (22, 21, 12)  # 21 is taken by the file
    assert vocabulary["gnu"].phrase == "big, hairy gnu"


def test_a_file_does_not_hide_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").write_text("cat\n")
    (tmp_path / "mine").write_text("cat\n")
    assert Vocabulary.parse("dog").names == ("dog",)
    assert Vocabulary.parse("mine").names == ("cat",)


def test_without_classes_all_known_ones_or_voc():
    assert Vocabulary.parse(None, MINI) is MINI
    assert Vocabulary.parse(None) == Vocabulary.voc()
    assert Vocabulary.parse("potted plant,DOG", MINI).names == ("pottedplant", "dog")


def test_a_models_own_class_keeps_its_id():
    model = Vocabulary((ClassEntry(3, "gnu", "hairy gnu"), ClassEntry(4, "yak", "yak")))
    assert Vocabulary.parse("hairy gnu", model).entries == model.entries[:1]


@pytest.mark.parametrize("text", ["dog,zebra", "voc"])
def test_unknown_class_lists_the_known_ones(text):
    with pytest.raises(DiffuMaskError, match="mini does not know.*it knows aeroplane, dog, cat, pottedplant") as caught:
        Vocabulary.parse(text, MINI, "mini")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "no class"),
        (" , ", "no class"),
        ("dog,dog", "clash"),
        ("dog,Dog", "clash"),
        ("fire truck,fire-truck", "clash"),
        ("../x", "cannot read"),
        ("dog,../x", "file names"),
        ("dog,a/b", "file names"),
        ("dog,a\\b", "file names"),
        ("dog,.hidden", "file names"),
        ("dog,a+b", "file names"),
        ('dog,"quoted"', "file names"),
        ("dog,tab\tname", "file names"),
        ("dog,two  spaces", "file names"),
        ("dog,line\nname", "file names"),
        ("dog," + "x" * 81, "file names"),
        ("dog,bad\udcff", "readable"),
        ("dog,bad\0", "readable"),
        ("missing.txt", "cannot read"),
    ],
)
def test_hostile_names_are_refused(text, word):
    with pytest.raises(DiffuMaskError, match=word) as caught:
        Vocabulary.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("1,dog\n", "line 1"),
        ("cat\nx,dog,dog\n", "line 2"),
        ("0,dog,dog\n", "0 is background"),
        ("255,dog,dog\n", "255 is ignored"),
        ("5,dog, \n", "empty phrase"),
        ("5,background,dog\n", "what no class covers"),
        ("5,dog, Background \n", "what no class covers"),
        ("dog\nBACKGROUND\n", "what no class covers"),
        ("5,dog,dog\n5,cat,cat\n", "clash"),
        ("# nothing\n", "no class"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, word):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DiffuMaskError, match=word):
        Vocabulary.from_file(path)


def test_unreadable_file(tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        DiffuMaskError, match="binary.txt, line 1: the text is not in UTF-8: give .* with one class a line"
    ):
        Vocabulary.from_file(path)
    for name in ("nofile.txt", "lists/nofile", str(tmp_path / "no.csv")):
        with pytest.raises(DiffuMaskError, match="nofile|no.csv") as caught:
            Vocabulary.parse(name)
        text = caught.value.as_flags()
        assert (
            f"{name}, which is neither a class nor a file: give names such as dog,cat, or voc, or a text file" in text
        )
        assert "one class a line, as name (dog) or as id,name,phrase (30,dgs,guide dog)" in text and "--" not in text
    path.write_text("30,dgs,guide dog\ndog\n")
    assert Vocabulary.parse(str(path)).phrases == ("guide dog", "dog")


def test_too_many_classes():
    with pytest.raises(DiffuMaskError, match="use 1 to 254"):
        Vocabulary.named(f"noun{number}" for number in range(300))


@pytest.mark.parametrize(
    "name, size",
    [("voc", 20), ("cityscapes", 19), ("human-vehicle", 2), ("coco", 80), ("ade20k", 150), ("ade20k-3", 3)],
)
def test_shipped_vocabularies(name, size):
    vocabulary = Vocabulary.shipped(name)
    assert vocabulary.ids == tuple(range(1, size + 1)) and len(set(vocabulary.palette[3 : 3 * size + 3])) > 1
    assert Vocabulary.parse(name).entries == tuple(
        ClassEntry(entry.id, entry.name, entry.phrase) for entry in vocabulary.entries
    )
    assert Vocabulary.parse(name, sub_classes="auto") == vocabulary
    for entry in vocabulary.entries:
        assert entry.templates and ("{scene}" not in "".join(entry.templates) or entry.scenes)
        assert len(set(map(str.casefold, entry.sub_classes))) == len(entry.sub_classes) <= 100
        assert all(vocabulary.find(kind) == [entry.name] for kind in entry.sub_classes), entry.name


def test_shipped_names_are_those_of_the_data_sets():
    assert Vocabulary.shipped("voc").names == Vocabulary.voc().names == Vocabulary.parse("voc").names
    assert Vocabulary.shipped("cityscapes").names == (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    coco, ade20k = Vocabulary.shipped("coco"), Vocabulary.shipped("ade20k")
    assert (coco.names[0], coco.names[-1], coco["teddy bear"].id, coco["stop sign"].id) == (
        "person",
        "toothbrush",
        78,
        12,
    )
    assert [ade20k[name].id for name in ("wall", "person", "car", "bus", "flag")] == [1, 13, 21, 81, 150]
    assert set(Vocabulary.shipped("ade20k-3").names) == {"bus", "car", "person"}
    human, vehicle = Vocabulary.shipped("human-vehicle").entries
    assert {"person", "rider"} <= set(human.phrases) and {"car", "truck", "bus", "train"} <= set(vehicle.phrases)


def test_every_class_of_voc_has_sub_classes():
    counts = {entry.name: len(entry.sub_classes) for entry in Vocabulary.shipped("voc").entries}
    assert min(counts.values()) >= 30 and all(counts[name] >= 99 for name in ("dog", "bird", "aeroplane", "person"))
    sofas, couches = Vocabulary.shipped("voc")["sofa"].sub_classes, Vocabulary.shipped("coco")["couch"].sub_classes
    assert set(sofas) - set(couches) == {"sofa bed"}  # a bed is a class of COCO
    assert all("bus" in name or "coach" in name for name in Vocabulary.shipped("ade20k-3")["bus"].sub_classes)


def test_a_model_that_lists_its_classes_gets_their_phrases_alone():
    for text in ("dog,cat", None):
        assert Vocabulary.parse(text, MINI, sub_classes="auto") == Vocabulary.parse(text, MINI)
        assert Vocabulary.parse(text, MINI, sub_classes="none") == Vocabulary.parse(text, MINI)
    asked = Vocabulary.parse("dog", MINI, sub_classes=5)["dog"]
    assert len(asked.sub_classes) == 5 and asked.synonyms and not asked.scenes and not asked.templates


def test_a_model_that_may_know_any_word_gets_all():
    dog, zebra = Vocabulary.parse("dog,zebra", sub_classes="auto").entries
    assert len(dog.sub_classes) >= 99 and dog.synonyms == ("puppy",) and dog.scenes and dog.templates
    assert zebra == ClassEntry(21, "zebra", "zebra")
    few, none = (Vocabulary.parse("dog", sub_classes=how)["dog"] for how in (10, "none"))
    assert few.sub_classes == dog.sub_classes[:10] and none.sub_classes == () and none.synonyms == dog.synonyms


def test_a_word_that_is_a_class_itself_is_no_synonym():
    person, woman = Vocabulary.parse("person,woman", sub_classes="auto").entries
    assert "woman" in Vocabulary.shipped("voc")["person"].synonyms and "woman" not in person.synonyms
    assert not [kind for kind in person.sub_classes if kind.endswith(" woman")] and len(person.sub_classes) > 50
    assert woman.phrases == ("woman",)


def test_what_the_package_knows_of_a_class_leaves_out_the_other_classes_of_the_run(tmp_path):
    car, police = Vocabulary.parse("car,police car", sub_classes="auto").entries
    assert "police car" in Vocabulary.shipped("voc")["car"].sub_classes and "police car" not in car.sub_classes
    assert len(car.sub_classes) > 50 and police.phrases == ("police car",)
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[class]]\nname = "person"\n[[class]]\nname = "labour"\nphrases = ["construction worker", "worker", "miner"]\n'
    )
    vocabulary = Vocabulary.parse(str(path), sub_classes="auto")
    person = vocabulary["person"]
    assert {"worker", "miner"} < set(Vocabulary.shipped("voc")["person"].synonyms)
    assert not {"worker", "miner", "construction worker"} & {*person.synonyms, *person.sub_classes}
    assert all(vocabulary.find(kind) == ["person"] for kind in person.sub_classes) and len(person.sub_classes) > 50


def test_a_class_files_own_sub_classes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[class]]\nname = "dog"\nsub_classes = ["red dog", "blue dog"]\n\n[[class]]\nname = "cat"\n')
    for how, counts in (("auto", (2, 0)), (None, (2, 0)), ("none", (0, 0)), (1, (1, 1))):
        entries = Vocabulary.parse(str(path), MINI, sub_classes=how).entries
        assert tuple(len(entry.sub_classes) for entry in entries) == counts
    assert len(Vocabulary.parse(str(path), sub_classes="auto")["cat"].sub_classes) > 50  # as if it were typed


def test_what_classes_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").write_text("cat\n")
    (tmp_path / "mine").write_text("cat\n")
    assert Vocabulary.parse("coco").names[0] == "person" and Vocabulary.parse("./coco").names == ("cat",)
    given = ["coco", "./coco", "mine", "dog", "dog,cat", "x.toml"]
    assert [is_file(text) for text in given] == [False, True, True, False, False, True]


def test_classes_are_found_by_any_phrase():
    assert names_in("Two puppies on a couch beside an airplane, people watch") == ["dog", "sofa", "aeroplane", "person"]
    coco = Vocabulary.shipped("coco")
    assert coco.find("a hot dog, a teddy bear, a Wine Glass and mobile phones") == [
        "hot dog", "teddy bear", "wine glass", "cell phone",
    ]  # fmt: skip


def test_the_words_of_named_classes():
    words = phrases_and_ids([["dog"], ["dog"], ["dog"], ["person", "zebra"]], [
        "a puppy and a dog", "two puppies", "two dogs", "an old woman with zebras"
    ])  # fmt: skip
    assert words == ([["dog"], ["puppies"], ["dogs"], ["woman", "zebras"]], [[12], [12], [12], [15, 21]])
    assert phrases_and_ids([["dog", "zebra"]]) == ([["dog", "zebra"]], [[12, 21]])


def test_colours():
    red = ClassEntry(3, "gnu", "gnu", colour=(255, 0, 0))
    palette = Vocabulary((red, ClassEntry(4, "yak", "yak"))).palette
    assert palette[9:15] == [255, 0, 0, 0, 0, 128] and palette[:9] == voc_palette()[:9]
    assert palette_of([red.as_json()])[9:12] == [255, 0, 0]
    with pytest.raises(DiffuMaskError, match="gnu and yak have the same colour"):
        Vocabulary((red, ClassEntry(4, "yak", "yak", colour=(255, 0, 0))))
    with pytest.raises(DiffuMaskError, match="gnu and yak have the same colour"):
        Vocabulary((ClassEntry(3, "gnu", "gnu", colour=(0, 0, 128)), ClassEntry(4, "yak", "yak")))


@pytest.mark.parametrize("classes", [5, [5], [None]])
def test_classes_of_another_form_are_refused(classes):
    with pytest.raises(DiffuMaskError, match="classes are .*: give a list of names for each prompt"):
        names_of(["a dog"], classes, 1)
