"""prompts/class_entry.py: a class checks itself."""

import json

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry, phrases_by_name, words_of

DOG = ClassEntry(12, "dog", "dog", ["puppy"], ["Labrador dog", "small puppy"], scenes=["here"], colour=[1, 2, 3])


def test_what_is_left_out_is_not_recorded():
    assert ClassEntry(12, "dog", "dog").as_json() == {"id": 12, "name": "dog", "phrase": "dog"}
    recorded = json.loads(json.dumps(DOG.as_json()))
    assert recorded["synonyms"] == ["puppy"] and "views" not in recorded
    assert ClassEntry(**recorded) == DOG and hash(ClassEntry(**recorded)) == hash(DOG)


def test_all_its_words_are_the_class():
    assert DOG.phrases == ("dog", "puppy") and DOG.phrase_in("a photo of small puppies and a dog") == "puppies"
    assert phrases_by_name([DOG.as_json()]) == {"dog": ("dog", "puppy")}
    assert sorted(words_of([DOG.as_json()])["dog"]) == ["dog", "dogs", "puppies", "puppy"]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"sub_classes": ["Labrador"]}, "sub-class 'Labrador' of dog holds no phrase .* write 'Labrador dog', or add"),
        ({"sub_classes": ["hotdog"]}, "holds no phrase"),
        ({"synonyms": [" "]}, "empty phrase"),
        ({"synonyms": ["Background"]}, "what no class covers"),
        ({"scenes": ["bad\0"]}, "readable"),
        ({"views": ["bad\udcff"]}, "readable"),
        ({"templates": ["a photo"]}, "must hold {objects}"),
        ({"colour": (0, 0, 0)}, "background's 0, 0, 0"),
        ({"colour": (224, 224, 192)}, "what is ignored"),
        ({"colour": (1, 2, 256)}, "from 0 to 255"),
        ({"colour": (1, 2)}, "from 0 to 255"),
        ({"scenes": ["x" * 501]}, "501 letters: 500 fit"),
    ],
)
def test_refuses(change, word):
    with pytest.raises(DiffuMaskError, match=word) as caught:
        ClassEntry(12, "dog", "dog", **change)
    assert "\n" not in str(caught.value)
