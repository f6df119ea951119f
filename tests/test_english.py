"""prompts/english.py: articles and plurals."""

import pytest

from diffumask_fast.prompts.english import article, is_plural, plural


@pytest.mark.parametrize(
    "phrase, wanted",
    [
        ("aeroplane", "an aeroplane"), ("dog", "a dog"), ("unicycle", "a unicycle"), ("Ewe", "an Ewe"),
        ("umbrella", "an umbrella"), ("European hare", "a European hare"), ("bus", "a bus"), ("sheep", "a sheep"),
        ("people", "people"), ("traffic lights", "traffic lights"), ("old women", "old women"), ("skis", "skis"),
        ("vegetation", "vegetation"), ("wine glass", "a wine glass"), ("cactus", "a cactus"), ("lens", "a lens"),
        ("specimen", "a specimen"), ("犬", "a 犬"), ("tennis", "a tennis"),
    ],
)  # fmt: skip
def test_article(phrase, wanted):
    assert article(phrase) == wanted


@pytest.mark.parametrize(
    "phrase, wanted",
    [
        ("dog", "dogs"), ("guide dog", "guide dogs"), ("bus", "buses"), ("Bus", "Buses"), ("person", "people"),
        ("old woman", "old women"), ("fireman", "firemen"), ("human", "humans"), ("puppy", "puppies"), ("boy", "boys"),
        ("couch", "couches"), ("glass", "glasses"), ("knife", "knives"), ("Child", "Children"), ("ski", "skis"),
        ("sheep", None), ("people", None), ("traffic lights", None), ("scissors", None), ("vegetation", None),
        ("犬", None), ("собака", None), ("naïve", None), ("x-ray", None), ("42", None),
    ],
)  # fmt: skip
def test_plural(phrase, wanted):
    assert plural(phrase) == wanted
    assert wanted is None or is_plural(wanted)
