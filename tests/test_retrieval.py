"""prompts/retrieval.py: which captions serve which classes, and which are the best."""

import json
import random

import pytest

from diffumask_fast.prompts.planner import Plan, Recipe
from diffumask_fast.prompts.retrieval import BANNED, Best, CaptionMatcher, Retrieved, chance
from diffumask_fast.prompts.vocabulary import ClassEntry, Vocabulary

VOC = Vocabulary.voc()
LONG = "a dog " + "very " * 49
FOUND = Retrieved(
    "0" * 64, "words", 9, "reference",
    ((("dog",), tuple(f"Photo of dog {i}" for i in range(9))), (("car", "dog"), ("Photo of a dog in a car",))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("A DOG's life", ("dog",)),
        ("my old, wet, (black) dog.", ("dog",)),
        ("the very old wet black dog", ()),  # the sixth word
        ("my dining table", ("diningtable",)),
        ("a table", ()),
        ("a dogma", ()),
        ("a dog and its dog", ("dog",)),
        ("a dog and a cat", ()),  # which would be drawn without a mask
        ("a dog in the garden of a person", ()),
        ("a dog - stock photo", ()),
        ("cartoon of a dog", ()),
        ("a Close-Up: dog", ()),
        (LONG, ()),
        ("", ()),
    ],
)
def test_the_reference_s_filters(caption, names):
    assert CaptionMatcher(VOC).match(caption) == names


def test_without_filters_the_words_alone_count():
    matcher = CaptionMatcher(VOC, caption_filter="none")
    for caption in ("the very old wet black dog", "a dog - stock photo", LONG):
        assert matcher.match(caption) == ("dog",)
    assert matcher.match("a dog and a cat") == ()
    assert matcher.prompt("my dog") == "my dog" and CaptionMatcher(VOC).prompt("my dog") == "Photo of my dog"
    assert len(BANNED) == 19


def test_with_two_classes_a_caption_names_just_these():
    matcher = CaptionMatcher(VOC, classes_per_image=2)
    assert matcher.match("a dog that sits beside my very old sofa") == ("dog", "sofa")
    assert matcher.match("my very old wet black dog and a sofa") == ()
    assert matcher.match("a dog") == matcher.match("a dog, a cat and a sofa") == ()


def test_the_longest_phrase_wins_and_scripts_without_spaces_are_read():
    entries = [
        (29, "hot", "hot"),
        (30, "dog", "dog"),
        (31, "hot dog", "hot dog"),
        (32, "inu", "犬"),
        (33, "bär", "BÄR"),
    ]
    matcher = CaptionMatcher(Vocabulary(tuple(ClassEntry(*entry) for entry in entries)))
    assert matcher.match("a hot dog on a plate") == ("hot dog",)
    assert matcher.match("the day of a dog") == ("dog",)
    assert matcher.match("黒い犬が走る") == ("inu",)
    assert matcher.match("ein bär im Wald") == ("bär",)


def test_plurals_and_synonyms_are_the_class():
    entries = (ClassEntry(12, "dog", "dog", synonyms=("guide dog", "puppy")), ClassEntry(15, "person", "person"))
    matcher = CaptionMatcher(Vocabulary(entries))
    assert matcher.match("two puppies") == matcher.match("guide dogs at work") == ("dog",)
    assert matcher.match("many people") == ("person",) and matcher.match("people and dogs") == ()
    found = Retrieved("0" * 64, "words", 9, "reference", ((("dog",), ("Photo of two puppies",)),))
    request = Plan(Recipe(Vocabulary(entries[:1]), 1, retrieved=found))[0]
    assert request.prompt == "Photo of two puppies" and request.phrases == ("puppies",)


def test_a_caption_is_read_as_prompts_are():
    for text in ("glass,glasses", "glasses,glass"):  # a plural that is a class of its own is that class
        matcher = CaptionMatcher(Vocabulary.parse(text))
        assert matcher.match("glasses on a table") == ("glasses",) and matcher.match("my glass") == ("glass",)
    matcher = CaptionMatcher(Vocabulary.parse("bird,dog,cat"))
    for caption in ("a bird,dog and friends", "a bird near cat/dog", "bird&dog", "my bird (and dog)", "bird...dog"):
        assert matcher.match(caption) == (), caption
    assert matcher.match("see-through/bird") == matcher.match("a dog-friendly bird") == ("bird",)
    assert matcher.match("one,two,three,four,five bird") == ("bird",)  # the second word
    panda = CaptionMatcher(Vocabulary.parse("熊,熊猫"))
    assert panda.match("可爱 大熊猫") == ("熊猫",) and panda.match("大熊") == ("熊",) and panda.match("熊 熊猫") == ()


def test_the_best_are_the_same_in_any_order_and_each_once():
    texts = [f"text {i % 700}" for i in range(2000)]
    expected = sorted(set(texts), key=lambda text: (chance(text), text), reverse=True)[:50]
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        best = Best(50)
        for text in texts:
            best.add(chance(text), text)
        assert best.ranked() == expected
    tied = Best(2)
    for text in ("b", "a", "c", "b"):
        tied.add(1.0, text)
    assert tied.ranked() == ["c", "b"]


def test_what_was_found_is_read_back():
    assert Retrieved.from_bytes(FOUND.as_bytes()) == FOUND
    assert FOUND.options["captions"] == "0" * 64 and len(FOUND.options["retrieved"]) == 64
    recipe = Recipe(VOC, 40, seed=3, retrieved=FOUND)
    assert Recipe.from_json(json.loads(json.dumps(recipe.as_json()))) == recipe
    assert Recipe.from_json(Recipe(VOC, 40).as_json()).retrieved is None


def test_captions_stand_in_the_place_of_templates_where_there_are_some():
    vocabulary = Vocabulary.parse("dog,cat")
    plain, plan = Plan(Recipe(vocabulary, 60, seed=3)), Plan(Recipe(vocabulary, 60, seed=3, retrieved=FOUND))
    dogs, cats = plan[::2], plan[1::2]
    assert {request.prompt for request in dogs} == set(dict(FOUND.captions)["dog",])
    assert cats == plain[1::2] and cats[0].prompt.startswith("a photo of a cat")
    assert [(one.key, one.seed, one.phrases) for one in plan] == [(one.key, one.seed, one.phrases) for one in plain]
    assert plan[40] == Plan(plan.recipe)[40] == Plan(Recipe(vocabulary, 41, seed=3, retrieved=FOUND))[40]


def test_captions_of_two_classes_serve_both_orders():
    vocabulary = Vocabulary.parse("dog,car,cat")
    plan = Plan(Recipe(vocabulary, 30, classes_per_image=2, retrieved=FOUND))
    prompts = {request.classes: request.prompt for request in plan}
    assert prompts["dog", "car"] == prompts["car", "dog"] == "Photo of a dog in a car"
    assert prompts["dog", "cat"].startswith("a photo of a dog and a cat ")
