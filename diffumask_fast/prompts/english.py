"""English as far as prompts need it: articles, and the plurals of nouns."""

from functools import lru_cache

_AN = tuple("aeiou")
_A = ("eu", "one", "uni", "use", "usu", "ute")  # begin with a vowel in writing, with a consonant in speech
_IRREGULAR = {
    "person": "people", "child": "children", "man": "men", "woman": "women", "ox": "oxen", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "mouse": "mice", "knife": "knives", "wolf": "wolves", "calf": "calves",
    "leaf": "leaves", "loaf": "loaves", "shelf": "shelves", "scarf": "scarves", "half": "halves", "elf": "elves",
    "wife": "wives", "ski": "skis", "taxi": "taxis", "emu": "emus", "gnu": "gnus",
    "menu": "menus", "tomato": "tomatoes", "potato": "potatoes", "hero": "heroes", "mango": "mangoes",
}  # fmt: skip
_ALIKE = {  # one or many
    "sheep", "fish", "deer", "moose", "bison", "salmon", "trout", "aircraft", "spacecraft", "hovercraft", "series",
    "species", "swine", "shrimp", "elk",
}  # fmt: skip
_UNCOUNTED = {
    "vegetation", "terrain", "grass", "broccoli", "water", "snow", "sand", "food", "furniture", "clothing", "fruit",
    "luggage", "wildlife", "cattle", "poultry", "traffic", "rice", "bread",
}  # fmt: skip
_SINGULAR = ("ss", "us", "is")  # how words end that end in s and are one thing
_ONE = {"lens", "canvas", "gas", "atlas", "christmas"}
_NO_MEN = ("human", "german", "roman", "shaman", "talisman", "caiman", "ottoman", "norman")
_NOT_OF_MEN = ("specimen", "acumen", "abdomen", "stamen", "cyclamen", "regimen", "ramen")
_PLURALS = set(_IRREGULAR.values())


@lru_cache(2**13)
def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, and nothing before many things or what is not counted.

    Example:
        >>> article("dog"), article("old oak"), article("traffic lights"), article("vegetation")
        ('a dog', 'an old oak', 'traffic lights', 'vegetation')
    """
    word = phrase.lower()
    last = word.split()[-1:]
    if last and (last[0] in _UNCOUNTED or is_plural(last[0])):
        return phrase
    return f"{'an' if word.startswith(_AN) and not word.startswith(_A) else 'a'} {phrase}"


def is_plural(phrase: str) -> bool:
    """Tell whether an English phrase names several things."""
    word = (phrase.lower().split() or [""])[-1]
    if word in _PLURALS:
        return True
    if word.endswith("men") and len(word) > 4 and word not in _NOT_OF_MEN:
        return True
    is_letters = word.isascii() and word.isalpha() and len(word) > 3
    return is_letters and word.endswith("s") and not word.endswith(_SINGULAR) and word not in _ONE | _ALIKE


def plural(phrase: str) -> str | None:
    """Return the plural of an English phrase; None where it has none, or none that is known.

    Example:
        >>> plural("guide dog"), plural("bus"), plural("fireman"), plural("traffic lights"), plural("犬")
        ('guide dogs', 'buses', 'firemen', None, None)
    """
    before, _, word = phrase.rpartition(" ")
    small = word.lower()
    if not (word.isascii() and word.isalpha()) or small in _ALIKE or small in _UNCOUNTED or small in _PLURALS:
        return None
    if small in _IRREGULAR:
        made = word[:1] + _IRREGULAR[small][1:]
    elif small.endswith("man") and not small.endswith(_NO_MEN):
        made = word[:-2] + "en"
    elif small.endswith("s") and not small.endswith(_SINGULAR) and small not in _ONE and len(word) > 3:
        return None
    elif small.endswith(("s", "x", "z", "ch", "sh")):
        made = word + "es"
    elif small.endswith("y") and small[-2:-1] not in _AN:
        made = word[:-1] + "ies"
    else:
        made = word + "s"
    return f"{before} {made}".strip()
