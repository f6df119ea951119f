"""From classes to requests: every sample is a pure function of (run seed, class, index)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, overload

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.retrieval import Retrieved
from diffumask_fast.prompts.vocabulary import ClassEntry, Vocabulary

TEMPLATE = "a photo of {objects} {scene}"
_AN = tuple("aeiou")
_A = ("eu", "one", "uni", "use", "usu", "ute")  # begin with a vowel in writing, with a consonant in speech
_SEED_BITS = 53  # exact in JSON

Fits = Callable[[str, tuple[str, ...]], bool]
Scenes = tuple[tuple[str, tuple[str, ...]], ...]  # each with the names of the classes that it suits, none for all


@dataclass(frozen=True)
class Recipe:
    """What a plan is made from: with the same recipe every process plans the same requests.

    Args:
        vocabulary: the classes.
        num: number of samples, at least 1.
        seed: of the run.
        classes_per_image: how many different classes one prompt names.
        templates: captions with `{objects}` and, if wanted, `{scene}`.
        scenes: such as "on the grass", each with the names of the classes that it suits, none for all of them; also a
            mapping, or scenes alone. None is the list that comes with the package.
        negative_prompt: the same for all samples.
        rounds: how many samples of each class, round after round, `num` in all; none takes the classes in turn.
        retrieved: captions of a file, which stand in the place of templates where there are some of the classes.

    Raises:
        DiffuMaskError: a number is out of range, or a template cannot be filled.
    """

    vocabulary: Vocabulary
    num: int
    seed: int = 0
    classes_per_image: int = 1
    templates: tuple[str, ...] = (TEMPLATE,)
    scenes: Scenes | Mapping[str, Sequence[str]] | Sequence[str] | None = None
    negative_prompt: str = ""
    rounds: tuple[tuple[int, ...], ...] = ()
    retrieved: Retrieved | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "rounds", tuple(map(tuple, self.rounds)))
        object.__setattr__(self, "scenes", _with_classes(load_scenes() if self.scenes is None else self.scenes))
        if self.num < 1:
            raise DiffuMaskError(f"`num` is {self.num}: ask for at least 1 image")
        if not 1 <= self.classes_per_image <= len(self.vocabulary):
            num = f"`classes_per_image` is {self.classes_per_image} and the number of classes {len(self.vocabulary)}"
            raise DiffuMaskError(f"{num}: give 1 to {len(self.vocabulary)}, or name more classes")
        for template in self.templates:
            if "{objects}" not in template:
                raise DiffuMaskError(f"template {template!r} must hold {{objects}}, where the classes go")
        if not self.templates or not self.scenes:
            raise DiffuMaskError("the list of templates or scenes is empty: give at least one")
        if self.rounds and sum(map(sum, self.rounds)) != self.num:
            raise DiffuMaskError(
                f"`num` is {self.num} and the rounds have {sum(map(sum, self.rounds))} images: match them"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as JSON types."""
        return {**asdict(self), "vocabulary": [asdict(entry) for entry in self.vocabulary.entries]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `as_json` wrote."""
        entries = [ClassEntry(**entry) for entry in values["vocabulary"]]
        retrieved = Retrieved(**values["retrieved"]) if values.get("retrieved") else None
        return cls(**{**values, "vocabulary": Vocabulary(tuple(entries)), "retrieved": retrieved})


class Plan(Sequence[Request]):
    """The requests of a recipe in the order of drawing, each made when it is asked for.

    Classes are taken in turn, in each round those that have samples left in it. A sample's caption, further classes and
    image seed are hashes of (seed, class name, its number in the class), so a larger `num` or another round adds
    samples and changes none. A key is the class and the number, `dog-000042`, unique in the plan; with more classes the
    first one is the one whose turn it is: `car+dog-000003`.

    Args:
        recipe: what they are made from.
        fits: tells whether all phrases can be found in a prompt; captions it refuses are dropped.

    Raises:
        DiffuMaskError: a request is asked for, and no caption of its classes fits.
    """

    def __init__(self, recipe: Recipe, fits: Fits | None = None) -> None:
        self.recipe = recipe
        self._captions = _Captions(recipe, fits)
        self._spans = list(_spans(recipe))
        self._starts = [span.start for span in self._spans]

    @property
    def dropped(self) -> int:
        """The number of captions that did not fit, of the classes that were planned so far."""
        return self._captions.dropped

    def __len__(self) -> int:
        return self.recipe.num

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Request, ...]: ...

    def __getitem__(self, index: int | slice) -> Request | tuple[Request, ...]:
        numbers = range(len(self))[index]
        return self._request(numbers) if isinstance(numbers, int) else tuple(map(self._request, numbers))

    def __iter__(self) -> Iterator[Request]:
        return map(self._request, range(len(self)))

    def _request(self, number: int) -> Request:
        seed, vocabulary = self.recipe.seed, self.recipe.vocabulary
        span = self._spans[bisect_right(self._starts, number) - 1]
        step, place = divmod(number - span.start, len(span.turns))
        first, index = vocabulary.entries[span.turns[place]], span.begun[place] + step
        entries = (first, *_others(vocabulary, first, index, seed, self.recipe.classes_per_image - 1))
        theme = self._captions.of(entries)
        return Request(
            key=f"{theme.stem}-{index:06d}",
            prompt=theme.captions[_hash(seed, "caption", first.name, index) % len(theme.captions)],
            negative_prompt=self.recipe.negative_prompt,
            phrases=theme.phrases,
            class_ids=theme.class_ids,
            seed=_hash(seed, "image", first.name, index) >> (64 - _SEED_BITS),
            classes=theme.classes,
        )


def plan(
    vocabulary: Vocabulary,
    num: int,
    seed: int = 0,
    classes_per_image: int = 1,
    *,
    fits: Fits | None = None,
    **keywords: Any,
) -> Plan:
    """Plan `num` samples, the classes of the vocabulary in turn; see `Recipe` and `Plan`.

    Args:
        vocabulary: the classes.
        num: number of samples, at least 1.
        seed: of the run.
        classes_per_image: how many different classes one prompt names.
        fits: tells whether all phrases can be found in a prompt.
        keywords: the templates, scenes and negative_prompt of the recipe.

    Raises:
        DiffuMaskError: a number is out of range, or a template cannot be filled.

    Example:
        >>> plan(Vocabulary.parse("dog,cat"), 3)[2].key
        'dog-000001'
    """
    return Plan(Recipe(vocabulary, num, seed, classes_per_image, **keywords), fits)


def load_scenes() -> dict[str, tuple[str, ...]]:
    """Read the package's scenes: each with the names of the VOC classes that it suits, none for all classes."""
    text = resources.files(__package__).joinpath("scenes.txt").read_text("utf-8")
    lines = [line.split(":") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {scene.strip(): () if names.strip() == "*" else tuple(names.split()) for scene, names in lines}


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    word = phrase.lower()
    return f"{'an' if word.startswith(_AN) and not word.startswith(_A) else 'a'} {phrase}"


@dataclass(frozen=True, slots=True)
class _Span:
    """Samples in which the same classes are taken in turn."""

    start: int  # number of its first sample in the plan
    turns: list[int]  # places of the classes in the vocabulary
    begun: list[int]  # samples that each of them has before


def _spans(recipe: Recipe) -> Iterator[_Span]:
    size = len(recipe.vocabulary)
    whole, more = divmod(recipe.num, size)
    begun, start = [0] * size, 0
    for counts in recipe.rounds or [[whole + (turn < more) for turn in range(size)]]:
        left = list(counts)
        while turns := [turn for turn, count in enumerate(left) if count]:
            steps = min(left[turn] for turn in turns)
            yield _Span(start, turns, [begun[turn] for turn in turns])
            start += steps * len(turns)
            for turn in turns:
                left[turn] -= steps
                begun[turn] += steps


@dataclass(frozen=True, slots=True)
class _Theme:
    """What all requests of the same classes share."""

    stem: str  # of their keys
    phrases: tuple[str, ...]
    class_ids: tuple[int, ...]
    classes: tuple[str, ...]
    captions: Sequence[str]


class _Captions:
    """The captions of each combination of classes, made once."""

    def __init__(self, recipe: Recipe, fits: Fits | None) -> None:
        self.templates, self.fits = recipe.templates, fits
        self.scenes = _suited(_with_classes(recipe.scenes or ()), recipe.vocabulary)
        self.retrieved = dict(recipe.retrieved.captions) if recipe.retrieved else {}
        self.dropped = 0
        self._known: dict[tuple[str, ...], _Theme] = {}

    def of(self, entries: tuple[ClassEntry, ...]) -> _Theme:
        names = tuple([entry.name for entry in entries])
        if names not in self._known:
            self._known[names] = _Theme(
                stem="+".join(entry.stem for entry in entries),
                phrases=tuple(entry.phrase for entry in entries),
                class_ids=tuple(entry.id for entry in entries),
                classes=names,
                captions=self._make(entries),
            )
        return self._known[names]

    def _make(self, entries: tuple[ClassEntry, ...]) -> Sequence[str]:
        names = {entry.name for entry in entries}
        if found := self.retrieved.get(tuple(sorted(names))):
            return found
        nouns = [article(entry.phrase) for entry in entries]
        objects = " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))
        # Where no scene suits every class, take those that suit the first.
        scenes = [scene for scene, suits in self.scenes.items() if names <= suits]
        scenes = scenes or [scene for scene, suits in self.scenes.items() if entries[0].name in suits]
        drawn = [_fill(template, objects, scene) for template in self.templates for scene in scenes]
        drawn = list(dict.fromkeys(drawn))
        phrases = tuple(entry.phrase for entry in entries)
        kept = [caption for caption in drawn if self.fits is None or self.fits(caption, phrases)]
        self.dropped += len(drawn) - len(kept)
        if not kept:
            raise DiffuMaskError(
                f"no caption fits {' and '.join(phrases)}: the text encoder reads 77 tokens and must find each phrase "
                f"among them; shorten the phrase or the template (one caption was: {drawn[0]!r})"
            )
        return kept


def _fill(template: str, objects: str, scene: str) -> str:
    before, after = template.split("{objects}", 1)
    return " ".join((before.replace("{scene}", scene) + objects + after.replace("{scene}", scene)).split())


def _with_classes(
    scenes: Mapping[str, Sequence[str]] | Sequence[str] | Sequence[tuple[str, Sequence[str]]],
) -> Scenes:
    pairs = scenes.items() if isinstance(scenes, Mapping) else scenes
    return tuple((pair, ()) if isinstance(pair, str) else (pair[0], tuple(pair[1])) for pair in pairs)


def _suited(scenes: Scenes, vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """Return each scene with the set of classes it suits; classes that no scene names are suited by all."""
    every = frozenset(vocabulary.names)
    named = {name for _, names in scenes for name in names}
    return {scene: frozenset(names) | (every - named) if names else every for scene, names in scenes}


def _others(vocabulary: Vocabulary, first: ClassEntry, index: int, seed: int, count: int) -> list[ClassEntry]:
    """Draw further classes by the smallest hashes, whatever the order of the vocabulary."""
    rest = [entry for entry in vocabulary.entries if entry.name != first.name] if count else []
    return sorted(rest, key=lambda entry: _hash(seed, "class", first.name, index, entry.name))[:count]


def _hash(*parts: str | int) -> int:
    """Return 64 bits that depend on the parts alone, the same in every process and on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
