"""From classes to requests: every sample is a pure function of (run seed, class, index)."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import ClassEntry, Vocabulary

TEMPLATE = "a photo of {objects} {scene}"
_AN = tuple("aeiou")
_A = ("eu", "one", "uni", "use", "usu", "ute")  # written with a vowel, spoken with a consonant
_SEED_BITS = 53  # exact in JSON


@dataclass(frozen=True)
class Plan(Sequence):
    """Requests in the order of drawing.

    Args:
        requests: all of them.
        dropped: the number of captions that were left out because they did not fit.
    """

    requests: tuple[Request, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index):
        return self.requests[index]


def plan(
    vocabulary: Vocabulary,
    num: int,
    seed: int = 0,
    classes_per_image: int = 1,
    *,
    templates: Sequence[str] = (TEMPLATE,),
    scenes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    negative_prompt: str = "",
    fits: Callable[[str, tuple[str, ...]], bool] | None = None,
) -> Plan:
    """Plan `num` samples, the classes of the vocabulary in turn.

    The n-th sample is number n // len(vocabulary) of its class. Its caption, further classes and image seed are hashes
    of (seed, class name, that number), so a larger `num` adds samples and changes none. A key is the class and the
    number, `dog-000042`; with more classes the first one is the one whose turn it is: `car+dog-000003`.

    Args:
        vocabulary: the classes.
        num: number of samples, at least 1.
        seed: of the run.
        classes_per_image: how many different classes one prompt names.
        templates: captions with `{objects}` and, if wanted, `{scene}`.
        scenes: such as "on the grass"; a mapping gives the class names that a scene suits, none for all of them. None
            is the list that comes with the package.
        negative_prompt: the same for all samples.
        fits: tells whether all phrases can be found in a prompt; captions it refuses are dropped and counted.

    Returns:
        The requests; `.dropped` counts captions.

    Raises:
        DiffuMaskError: a number is out of range, or no caption of a class fits.

    Example:
        >>> plan(Vocabulary.parse("dog,cat"), 3)[2].key
        'dog-000001'
    """
    if num < 1:
        raise DiffuMaskError(f"num is {num}: ask for at least 1 image")
    if not 1 <= classes_per_image <= len(vocabulary):
        raise DiffuMaskError(
            f"{classes_per_image} classes per image are wanted from {len(vocabulary)}: name more classes"
        )
    captions = _Captions(templates, _suited(scenes, vocabulary), fits)
    requests = []
    for number in range(num):
        index, turn = divmod(number, len(vocabulary))
        first = vocabulary.entries[turn]
        entries = (first, *_others(vocabulary, first, index, seed, classes_per_image - 1))
        choices = captions.of(entries)
        requests.append(
            Request(
                key=f"{'+'.join(entry.stem for entry in entries)}-{index:06d}",
                prompt=choices[_hash(seed, "caption", first.name, index) % len(choices)],
                negative_prompt=negative_prompt,
                phrases=tuple(entry.phrase for entry in entries),
                class_ids=tuple(entry.id for entry in entries),
                seed=_hash(seed, "image", first.name, index) >> (64 - _SEED_BITS),
                classes=tuple(entry.name for entry in entries),
            )
        )
    return Plan(tuple(requests), captions.dropped)


def load_scenes() -> dict[str, tuple[str, ...]]:
    """Read the package's scenes: each with the names of the VOC classes that it suits, none for all classes."""
    text = resources.files(__package__).joinpath("scenes.txt").read_text("utf-8")
    lines = [line.split(":") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {scene.strip(): () if names.strip() == "*" else tuple(names.split()) for scene, names in lines}


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    word = phrase.lower()
    return f"{'an' if word.startswith(_AN) and not word.startswith(_A) else 'a'} {phrase}"


class _Captions:
    """The captions of each combination of classes, made once."""

    def __init__(self, templates, scenes: dict[str, frozenset[str]], fits):
        for template in templates:
            if "{objects}" not in template:
                raise DiffuMaskError(f"template {template!r} must hold {{objects}}, where the classes go")
        if not templates or not scenes:
            raise DiffuMaskError("the list of templates or scenes is empty: give at least one")
        self.templates, self.scenes, self.fits = templates, scenes, fits
        self.dropped = 0
        self._known: dict[tuple[str, ...], list[str]] = {}

    def of(self, entries: tuple[ClassEntry, ...]) -> list[str]:
        names = tuple(entry.name for entry in entries)
        if names not in self._known:
            self._known[names] = self._make(entries)
        return self._known[names]

    def _make(self, entries: tuple[ClassEntry, ...]) -> list[str]:
        names = {entry.name for entry in entries}
        nouns = [article(entry.phrase) for entry in entries]
        objects = " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))
        # where no scene suits every class, one that suits the first must do
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


def _suited(
    scenes: Sequence[str] | Mapping[str, Sequence[str]] | None, vocabulary: Vocabulary
) -> dict[str, frozenset[str]]:
    """Return each scene with the set of classes it suits; classes that no scene names are suited by all."""
    scenes = load_scenes() if scenes is None else scenes
    scenes = scenes if isinstance(scenes, Mapping) else dict.fromkeys(scenes, ())
    every = frozenset(vocabulary.names)
    named = {name for names in scenes.values() for name in names}
    return {scene: frozenset(names) | (every - named) if names else every for scene, names in scenes.items()}


def _others(vocabulary: Vocabulary, first: ClassEntry, index: int, seed: int, count: int) -> list[ClassEntry]:
    """Draw further classes by the smallest hashes, whatever the order of the vocabulary."""
    rest = [entry for entry in vocabulary.entries if entry.name != first.name] if count else []
    return sorted(rest, key=lambda entry: _hash(seed, "class", first.name, index, entry.name))[:count]


def _hash(*parts: str | int) -> int:
    """Return 64 bits that depend on the parts alone, the same in every process and on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
