"""prompts/request.py: a request checks itself."""

import dataclasses
import sys
import unicodedata

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import Request, is_file_stem

GOOD = Request("car+dog-000003", "a photo of a car and a dog", "", ("car", "dog"), (7, 12), seed=0)


def test_is_frozen_and_names_its_classes():
    assert GOOD.classes == ("car", "dog")
    assert hash(GOOD) == hash(dataclasses.replace(GOOD))
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.seed = 1


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../x-000000"},
        {"key": ""},
        {"key": "a b"},
        {"key": "-a"},
        {"key": "a/b"},
        {"key": "x" * 201},
        {"phrases": ("car",)},
        {"phrases": (), "class_ids": (), "classes": ()},
        {"class_ids": (7, 255)},
        {"class_ids": (0, 7)},
        {"classes": ("car", "background")},
        {"phrases": ("car", "Background")},
        {"seed": -1},
        {"seed": 2**63},
        {"prompt": "bad \udcff"},
        {"negative_prompt": "bad \0"},
    ],
)
def test_refuses(change):
    with pytest.raises(DiffuMaskError) as caught:
        dataclasses.replace(GOOD, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ['say "hi", ../../etc', "a 犬 in the snow\nsecond line", ""])
def test_takes_any_readable_prompt(prompt):
    assert dataclasses.replace(GOOD, prompt=prompt).prompt == prompt


@pytest.mark.parametrize("also", ["_-", "_-+."])
def test_letters_of_any_script_are_safe_in_a_file_name(also):
    every = [chr(number) for number in range(sys.maxunicode + 1)]
    kinds = {letter: unicodedata.category(letter)[0] for letter in every}
    assert {letter for letter in every if is_file_stem(letter)} == {letter for letter in every if kinds[letter] in "LN"}
    assert {letter for letter in every if is_file_stem(f"a{letter}", also)} == {
        letter for letter in every if kinds[letter] in "LMN" or letter in also
    }
    assert is_file_stem("a" * 200) and not is_file_stem("a" * 201) and not is_file_stem("é" * 101)
