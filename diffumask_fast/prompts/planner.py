"""From classes to requests: every sample is a pure function of (run seed, class, index)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple, overload

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.matching import matcher
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.retrieval import Retrieved
from diffumask_fast.prompts.templates import SCENE, VIEW, VIEWS, Frame, check_template, filled, make_frame
from diffumask_fast.prompts.vocabulary import Vocabulary

TEMPLATE = "a photo of {objects} {scene}"
_SEED_BITS = 53  # exact in JSON

Fits = Callable[[str, tuple[str, ...]], bool]
Scenes = tuple[tuple[str, tuple[str, ...]], ...]  # each with the names of the classes that it suits, none for all


@dataclass(frozen=True)
class Recipe:
    """What a plan is made from: with the same recipe every process plans the same requests.

    Args:
        vocabulary: the classes; what they say of templates, scenes and views holds for prompts that begin with them.
        num: number of samples, at least 1.
        seed: of the run.
        classes_per_image: how many different classes one prompt names.
        templates: captions with `{objects}` and, if wanted, `{scene}` and `{view}`.
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
            check_template(template)
        if not self.templates or not self.scenes:
            raise DiffuMaskError("the list of templates or scenes is empty: give at least one")
        if self.rounds and sum(map(sum, self.rounds)) != self.num:
            raise DiffuMaskError(
                f"`num` is {self.num} and the rounds have {sum(map(sum, self.rounds))} images: match them"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as JSON types."""
        return {**asdict(self), "vocabulary": [entry.as_json() for entry in self.vocabulary.entries]}

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
    samples and changes none. The sub-classes of a class take turns, in an order drawn from the seed. A key is the class
    and the number, `dog-000042`, unique in the plan; with more classes the first one is the one whose turn it is:
    `car+dog-000003`.

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
        caption = theme.captions[_hash(seed, "caption", first.name, index) % len(theme.captions)]
        if theme.kinds:
            caption = caption.about(theme, self._kinds(theme, index))
        return Request(
            key=f"{theme.stem}-{index:06d}",
            prompt=caption.text,
            negative_prompt=self.recipe.negative_prompt,
            phrases=caption.phrases,
            class_ids=theme.class_ids,
            seed=_hash(seed, "image", first.name, index) >> (64 - _SEED_BITS),
            classes=theme.classes,
        )

    def _kinds(self, theme: _Theme, index: int) -> list[str]:
        """Return what stands for each class in a prompt: of the first, sub-classes in turn, of the others any."""
        seed, first = self.recipe.seed, theme.classes[0]
        places = [index, *(_hash(seed, "sub-class", first, index, name) for name in theme.classes[1:])]
        return [names[place % len(names)] for names, place in zip(theme.kinds, places, strict=True)]


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


class _Caption(NamedTuple):
    """A prompt, and the words in it that stand for the classes."""

    text: str
    phrases: tuple[str, ...]
    frame: Frame | None = None  # what stands before and after the classes, where others may take their place

    def about(self, theme: _Theme, kinds: Sequence[str]) -> _Caption:
        """Return the caption with sub-classes in the place of the classes."""
        if self.frame is None:
            return self
        text = filled(self.frame, kinds)
        return _caption(text, theme.entries)


@dataclass(frozen=True, slots=True)
class _Theme:
    """What all requests of the same classes share."""

    entries: tuple[ClassEntry, ...]
    stem: str  # of their keys
    class_ids: tuple[int, ...]
    classes: tuple[str, ...]
    captions: list[_Caption]
    kinds: tuple[tuple[str, ...], ...]  # of each class what may stand for it; empty where that is its phrase alone


class _Captions:
    """The captions of each combination of classes, made once."""

    def __init__(self, recipe: Recipe, fits: Fits | None) -> None:
        self.templates, self.fits, self.seed = recipe.templates, fits, recipe.seed
        self.scenes = _suited(_with_classes(recipe.scenes or ()), recipe.vocabulary)
        self.naming = {scene for scene in self.scenes if recipe.vocabulary.find(scene)}  # what would have no mask
        self.retrieved = dict(recipe.retrieved.captions) if recipe.retrieved else {}
        self.dropped = 0
        self._known: dict[tuple[str, ...], _Theme] = {}
        self._sub_classes: dict[str, tuple[str, ...]] = {}

    def of(self, entries: tuple[ClassEntry, ...]) -> _Theme:
        names = tuple([entry.name for entry in entries])
        if names not in self._known:
            self._known[names] = _Theme(
                entries=entries,
                stem="+".join(entry.stem for entry in entries),
                class_ids=tuple(entry.id for entry in entries),
                classes=names,
                captions=self._make(entries),
                kinds=self._kinds(entries),
            )
        return self._known[names]

    def _make(self, entries: tuple[ClassEntry, ...]) -> list[_Caption]:
        if found := self.retrieved.get(tuple(sorted(entry.name for entry in entries))):
            return [_caption(text, entries) for text in found]
        frames = self._frames(entries)
        words = [entry.phrase for entry in entries]
        drawn = list(dict.fromkeys((filled(frame, words), frame) for frame in frames))
        captions = [_caption(text, entries, frame) for text, frame in drawn]
        kept = [caption for caption in captions if self._fit(caption)]
        if not kept:
            raise DiffuMaskError(
                f"no caption fits {' and '.join(words)}: the text encoder reads 77 tokens and must find each phrase "
                f"among them; shorten the phrase or the template (one caption was: {captions[0].text!r})"
            )
        return kept

    def _frames(self, entries: tuple[ClassEntry, ...]) -> dict[Frame, None]:
        """Return what may stand before and after the classes, each once."""
        places, views = self._scenes_of(entries), entries[0].views or VIEWS
        return dict.fromkeys(
            make_frame(template, scene, view)
            for template in entries[0].templates or self.templates
            for scene in (places if SCENE in template else places[:1])
            for view in (views if VIEW in template else views[:1])
        )

    def _scenes_of(self, entries: tuple[ClassEntry, ...]) -> list[str]:
        """Return the scenes that suit every class; where none does, those that suit the first."""
        suited = [entry.scenes or self._general_scenes(entry.name) for entry in entries]
        return [scene for scene in suited[0] if all(scene in some for some in suited[1:])] or list(suited[0])

    def _general_scenes(self, name: str) -> list[str]:
        """Return the scenes that suit a class: without those that name a class of the run, if there are others."""
        suited = [scene for scene, names in self.scenes.items() if name in names]
        return [scene for scene in suited if scene not in self.naming] or suited

    def _kinds(self, entries: tuple[ClassEntry, ...]) -> tuple[tuple[str, ...], ...]:
        """Return the sub-classes of each class that name none of the other classes, in the order of drawing."""
        if not any(entry.sub_classes for entry in entries):
            return ()
        kinds = []
        for entry in entries:
            others = tuple(phrase for other in entries if other is not entry for phrase in other.phrases)
            names = self._sub_classes_of(entry)
            kinds.append(tuple(n for n in names if not others or not any(matcher(others).find(n))) or (entry.phrase,))
        return self._fitting(entries, kinds) if len(entries) > 1 else tuple(kinds)

    def _fitting(self, entries: tuple[ClassEntry, ...], kinds: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        """Return the sub-classes of each class without the longest ones, until the longest of all fit together."""
        left, frame = [sorted(names, key=len) for names in kinds], _longest(self._frames(entries))
        plain = [[entry.phrase] for entry in entries]
        while left != plain and not self._fit(_caption(filled(frame, [names[-1] for names in left]), entries)):
            place = max((at for at, names in enumerate(left) if names != plain[at]), key=lambda at: len(left[at][-1]))
            left[place] = left[place][:-1] or plain[place]
        return tuple(
            tuple(name for name in names if name in some) or tuple(some)
            for names, some in zip(kinds, left, strict=True)
        )

    def _sub_classes_of(self, entry: ClassEntry) -> tuple[str, ...]:
        """Return the sub-classes of a class that fit, in an order drawn from the seed, whatever order they have."""
        if entry.name not in self._sub_classes:
            names = sorted(entry.sub_classes, key=lambda name: _hash(self.seed, "sub-class", entry.name, name))
            longest = _longest(self._frames((entry,)))
            texts = {name: filled(longest, [name]) for name in names}
            kept = (name for name, text in texts.items() if self._fit(_caption(text, [entry])))
            self._sub_classes[entry.name] = tuple(kept)
        return self._sub_classes[entry.name]

    def _fit(self, caption: _Caption) -> bool:
        """Tell whether a caption's phrases are found in it, and count those that are dropped."""
        fit = self.fits is None or self.fits(caption.text, caption.phrases)
        self.dropped += not fit
        return fit


def _caption(text: str, entries: Sequence[ClassEntry], frame: Frame | None = None) -> _Caption:
    return _Caption(text, tuple([entry.phrase_in(text) for entry in entries]), frame)


def _longest(frames: Iterable[Frame]) -> Frame:
    """Return the frame in which the classes come last."""
    return max(frames, key=lambda frame: (len(frame[0]), len(frame[1])))


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
    chosen: list[ClassEntry] = []
    for entry in sorted(rest, key=lambda entry: _hash(seed, "class", first.name, index, entry.name)):
        if len(chosen) < count and not any(_clash(entry.phrases, one.phrases) for one in (first, *chosen)):
            chosen.append(entry)
    if len(chosen) < count:
        raise DiffuMaskError(
            f"{first.name} goes with fewer than {count} other classes in one prompt, for a phrase of one is within "
            "one of another: ask for fewer `classes_per_image`, or name more classes"
        )
    return chosen


@lru_cache(2**16)
def _clash(phrases: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Tell whether a phrase of one class is within one of the other, so that a prompt cannot tell them apart."""
    return any(
        next(matcher(some).find(one), None) is not None
        for some, many in ((phrases, others), (others, phrases))
        for one in many
    )


def _hash(*parts: str | int) -> int:
    """Return 64 bits that depend on the parts alone, the same in every process and on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
