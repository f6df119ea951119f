"""prompts/matching.py: a class's words in a text."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffumask_fast.prompts.matching import Matcher, phrase_in


@pytest.mark.parametrize(
    "phrases, text, found",
    [
        (["dog"], "a Dog, hotdogs, a dog-like DOG", ["dog", "dog"]),
        (["dog"], "two dogs", ["dogs"]),
        (["dog", "hot dog"], "a hot dog and a dog", ["hot dog", "dog"]),
        (["hot dog", "dog"], "hot  dogs\nand dogs", ["hot dogs", "dogs"]),
        (["cat", "cat fish"], "a cat fishes", ["cat"]),  # the longer one is there, but not whole
        (["person", "people"], "people", ["people"]),
        (["bus stop"], "a bus stopped at the bus stop", ["bus stop"]),
        (["犬", "猫"], "黒い犬と猫dog", ["犬", "猫"]),
        (["हिन"], "हिन्दी", []),  # a mark of the last letter follows
        (["हिन्दी"], "यह हिन्दी है", ["हिन्दी"]),
        (["naïve art"], unicodedata.normalize("NFD", "NAÏVE ART"), ["naïve art"]),
        (["c++ (a.*b)"], "c++ (a.*b) axxb", ["c++ (a.*b)"]),
        (["Straße"], "die STRASSE", ["Straße"]),
    ],
)
def test_whole_words_the_longest_first(phrases, text, found):
    assert [form for form, _ in Matcher(phrases).find(text)] == found


def test_the_phrase_of_a_form_is_told():
    assert list(Matcher(["child", "old man"]).find("Old men with children")) == [
        ("old men", "old man"),
        ("children", "child"),
    ]
    assert sorted(Matcher(["dog", "sheep"]).forms) == ["dog", "dogs", "sheep"]


def test_the_first_words_stand_for_the_class():
    person = ("person", "man", "woman")
    assert phrase_in("an old woman beside a person", person) == "woman"
    assert phrase_in("three people", person) == "people"
    assert phrase_in("", person) == phrase_in("a personal manner", person) == "person"


WORDS = st.text("ab é犬-", min_size=1, max_size=4).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=4), st.text("ab é犬- ", max_size=30))
def test_what_is_found_is_there_whole(phrases, text):
    folded = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    for form, phrase in Matcher([" ".join(phrase.split()) for phrase in phrases]).find(text):
        assert form.casefold() in folded and phrase
        if re.fullmatch("[abé]+", form):
            assert re.search(rf"(?<![abé-]){form}(?![abé-])", folded)
