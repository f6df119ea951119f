"""prompts/class_file.py: class files in TOML and in text; mistakes are named by file and line."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_file import MOST_BYTES, read_class_file
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import SHIPPED, Vocabulary

ROOT = Path(__file__).resolve().parents[1]

STREET = """# what we want
templates = ["a photo of {objects} {scene}", "{objects}, {view}"]
views = "from above"

[[class]]
name = "hound"          # a class of our own
id = 70
phrases = ["dog", "puppy"]
sub_classes = [
    "Labrador dog",
    "small puppy",
]
colour = "#0040ff"

[[class]]
name = "犬小屋"
phrases = "dog  house"
scenes = ["in a garden"]
colour = [250, 128, 0]

[[class]]
name = "car"

[scenes]
"on the street" = []
"on a lead" = ["hound"]
"""


def write(folder, text, name="street.toml", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("change", [str, lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_reads_toml(tmp_path, change):
    hound, house, car = Vocabulary.parse(str(write(tmp_path, change(STREET)))).entries
    assert (hound.id, hound.phrases, hound.sub_classes) == (70, ("dog", "puppy"), ("Labrador dog", "small puppy"))
    assert hound.scenes == ("on the street", "on a lead") and hound.views == ("from above",)
    assert (house.id, house.name, house.phrase, house.scenes) == (21, "犬小屋", "dog house", ("in a garden",))
    assert hound.colour == (0, 64, 255) and house.colour == (250, 128, 0)
    assert (car.id, car.phrase, car.scenes, car.colour) == (7, "car", ("on the street", "on a lead"), None)


def test_what_a_file_says_is_drawn(tmp_path):
    vocabulary = Vocabulary.from_file(write(tmp_path, STREET))
    prompts = {request.prompt for request in plan(vocabulary, 300)}
    hounds, scenes = ("Labrador dog", "small puppy"), ("on the street", "on a lead")
    assert prompts == {
        *(f"a photo of a {name} {scene}" for name in hounds for scene in scenes),
        "a Labrador dog, from above", "a small puppy, from above", "a photo of a dog house in a garden",
        "a dog house, from above", "a photo of a car on the street", "a photo of a car on a lead", "a car, from above",
    }  # fmt: skip
    phrases = {request.phrases for request in plan(vocabulary, 300)}
    assert phrases == {("dog",), ("puppy",), ("dog house",), ("car",)}


def test_150_classes_with_windows_line_ends(tmp_path):
    names = [f"ding {number} ü犬" for number in range(150)]
    text = "# alle\r\n" + "".join(
        f'[[class]] # {name}\r\nname = "{name}"\r\nid = {number}\r\nphrases = ["{name}", "sache {number}"]\r\n\r\n'
        for number, name in enumerate(names, 1)
    )
    vocabulary = Vocabulary.from_file(write(tmp_path, text))
    assert vocabulary.names == tuple(names) and vocabulary.ids == tuple(range(1, 151))
    assert vocabulary.find("SACHE 149 und ding 3 ü犬") == ["ding 148 ü犬", "ding 3 ü犬"]


CLASS = '[[class]]\nname = "dog"\n'


@pytest.mark.parametrize(
    "text, line, word",
    [
        ('[[class]]\nname = "dog\n', 2, "no TOML"),
        ("[[class]]\nname = dog\n", 2, "no TOML"),
        (CLASS + 'name = "cat"\n', 3, "no TOML"),
        ("x = " + "[" * 5000, 1, "no TOML"),
        ("\n" + CLASS + f"id = {'9' * 5000}\n", 5, "no TOML"),
        ('[class]\nname = "dog"\n', 1, r"begin each class with a line \[\[class\]\]"),
        ('klass = 1\n' + CLASS, 1, "'klass' is no key here: there are templates, scenes, views, class"),
        (CLASS + '\n# so\ncolor = "#000001"\n', 5, "'color' is no key here: there are name, id, phrases"),
        ("[[class]]\nid = 3\n", 1, 'each class has a name: write name = "..."'),
        ("[[class]]\nname = 3\n", 2, "each class has a name"),
        (CLASS + 'id = "3"\n', 3, "the id of dog is '3': give a whole number"),
        (CLASS + "id = true\n", 3, "give a whole number"),
        (CLASS + "id = 255\n", 1, "255 is ignored"),
        (CLASS + "phrases = 3\n", 3, r'phrases is a list of texts: write phrases = \["...", "..."\]'),
        (CLASS + 'phrases = ["dog", ""]\n', 3, "phrases is a list of texts"),
        (CLASS + 'phrases = ["bad\\u0000"]\n', 1, "no readable text"),
        (CLASS + 'sub_classes = ["Labrador"]\n', 1, "holds no phrase of the class"),
        (CLASS + 'templates = ["a photo"]\n', 1, "must hold {objects}"),
        (CLASS + 'colour = "blue"\n', 3, r"'blue' is no colour: write \"#40a0ff\" or \[64, 160, 255\]"),
        (CLASS + "colour = [1, 2, 300]\n", 3, "is no colour"),
        (CLASS + 'colour = "#000000"\n', 1, "background's"),
        (CLASS + "\n" + CLASS, 4, "clash"),
        (CLASS + '\n[[class]]\nname = "hound"\nid = 40\nphrases = ["x", "Dog"]\n', 4, "'dog' stands for dog and for"),
        (CLASS + 'colour = "#808080"\n[[class]]\nname = "car"\n', 4, "dog and car have the same colour"),
        (CLASS + '[scenes]\n"on a road" = []\n"in a box" = ["cat"]\n', 5, "'in a box' suits 'cat', which is no"),
        (CLASS + "[scenes]\nhere = 3\n", 4, "here is a list of texts"),
        (CLASS + "\n" + CLASS, 4, "clash, for they have one name: rename or remove one"),
        (CLASS + '\n[[class]]\nname = "gnome"\nid = 12\n', 4, "both have the id 12: give one of them another"),
        (CLASS + 'phrases = ["hound"]\n[[class]]\nname = "cat"\nphrases = ["cat", "Dog"]\n', 4, "'dog' stands for dog"),
        (CLASS + 'phrases = ["do\u200bg"]\n', 1, "the letter U.200B, which is not seen: remove it"),
        (CLASS + 'phrases = ["\ufeffdog"]\n', 1, r"U.FEFF"),
        (CLASS + 'phrases = ["\\u202edog", "do\\u0007g"]\n', 1, r"U.202E"),
        (CLASS + 'scenes = ["in a\u00adway"]\n', 1, r"U.00AD"),
        (CLASS + 'phrases = ["\u0301"]\n', 1, "empty phrase"),
        ('[[class]]\nname = "ignored"\n', 1, "'ignored' cannot be a class, for formats call pixels so"),
        ("# nothing\n", 0, "street.toml names no class: give a text file"),
        ("", 0, "street.toml names no class"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_line(tmp_path, text, line, word):
    path = write(tmp_path, text)
    with pytest.raises(DiffuMaskError, match=word) as caught:
        Vocabulary.from_file(path)
    assert "\n" not in str(caught.value)
    assert not line or str(caught.value).startswith(f"{path}, line {line}: ")


def test_mistakes_of_text_files_are_named_by_line_as_well(tmp_path):
    for text, line in (("# classes\n\n0,dog,dog\n", 3), ("dog\ncat\nDog\n", 3), ("5,a,one\n6,b,One\n", 2)):
        path = write(tmp_path, text, "list.txt")
        with pytest.raises(DiffuMaskError, match=re.escape(f"{path}, line {line}: ")):
            Vocabulary.from_file(path)


def test_a_text_file_has_whole_quotes_ids_of_few_digits_and_utf8(tmp_path):
    for data, line, words in (
        (b'dog\n"cat\nbird\n', 2, "the line is no class .unexpected end of data"),
        (b"dog\n" + b"9" * 5000 + b",x,x\n", 2, "is no class: write as name"),
        ("dog\ncaf\xe9\n".encode("latin1"), 2, "the text is not in UTF-8: give"),
    ):
        (path := tmp_path / "list.txt").write_bytes(data)
        with pytest.raises(DiffuMaskError, match=re.escape(f"{path}, line {line}: ") + ".*" + words):
            Vocabulary.from_file(path)


def test_150_classes_of_all_scripts_with_any_line_ends(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        text = "# ours\n\n".replace("\n", end) + end.join(
            f'[[class]]{end}name = "thing {n}" #{end}id = {n}{end}phrases = ["thing{n}", "caf\u00e9 {n}", "\u7269{n}"]'
            for n in range(1, 151)
        )
        path = tmp_path / "many.toml"
        path.write_bytes("\ufeff".encode() + text.encode())
        made = Vocabulary.from_file(path)
        assert made.ids == tuple(range(1, 151)) and made.find("a Thing7, \u7269150, cafe\u0301 15") == [
            "thing 7", "thing 150", "thing 15",
        ]  # fmt: skip
    path.write_text(
        '[[class]]\nname = "\u05db\u05dc\u05d1"\nphrases = ["\u0645\u06cc\u200c\u0648\u0647", "\U0001f415"]\n', "utf-8"
    )
    assert Vocabulary.from_file(path).find("a \U0001f415 here") == ["\u05db\u05dc\u05d1"]


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("folder.toml", "pipe.toml"):
        with pytest.raises(DiffuMaskError, match=f"{name} is no file"):
            Vocabulary.from_file(tmp_path / name)
    with pytest.raises(DiffuMaskError, match="zero is no file"):
        read_class_file("/dev/zero")
    (tmp_path / "large.toml").write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(DiffuMaskError, match="more than 4194304 bytes"):
        Vocabulary.from_file(tmp_path / "large.toml")


PIECES = st.sampled_from(
    ["[[class]]", "[class]", "[scenes]", "name = ", "id = ", "phrases = ", "scenes = ", "colour = ", '"dog"', "[]", "7",
     "{}", '["a", "b"]', '"{objects}"', "\n", "\r\n", "\r", "=", '"""', "'", "#", "\u2028", "1979-05-27", "nan", "."]
)  # fmt: skip


@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=60), st.sampled_from(["a.toml", "a.txt"]))
def test_any_text_is_read_or_refused_in_one_sentence(tmp_path_factory, text, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        Vocabulary.from_file(path)
    except DiffuMaskError as error:
        assert len(str(error).splitlines()) == 1


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "b.toml"
    path.write_bytes(data)
    try:
        Vocabulary.from_file(path)
    except DiffuMaskError as error:
        assert len(str(error).splitlines()) == 1


def test_both_ways_to_write_a_letter_and_lines_of_any_length(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_text('[[class]]\nname = "cafe\u0301"\nphrases = ["cafe\u0301 noir"]\n[scenes]\nhere = ["caf\u00e9"]\n')
    (line,) = read_class_file(path)
    assert (line.name, line.phrases) == ("caf\u00e9", ("caf\u00e9 noir",))
    path.write_text('[[class]]\nname = "dog"\nscenes = ["a\u2028b"]\n[[class]]\nname = "cat"\nid = "x"\n')
    with pytest.raises(DiffuMaskError, match="line 6: the id of cat"):
        read_class_file(path)
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog," + "x" * 200_000)
    with pytest.raises(DiffuMaskError, match="line 2: the line is no class"):
        read_class_file(path)


def test_the_documented_file_is_one(tmp_path):
    text = (ROOT / "docs" / "prompts.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    vocabulary = Vocabulary.from_file(write(tmp_path, example))
    assert len(plan(vocabulary, 50)[:]) == 50 and any(entry.sub_classes for entry in vocabulary.entries)
    for name in SHIPPED:
        assert f"`{name}`" in text
