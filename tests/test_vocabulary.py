"""prompts/vocabulary.py: what --classes takes."""

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.vocabulary import Vocabulary, voc_palette

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
    with pytest.raises(DiffuMaskError, match="cannot read the class list .*UTF-8 with one class a line"):
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
