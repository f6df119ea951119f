"""The captions of a run: found in a file, or those that its folder has kept."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from diffumask_fast.attention.spelling import Speller
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.schema import CAPTIONS, MANIFEST
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.caption_index import Embed, index_path, read_or_make
from diffumask_fast.generation.embedding import compares_texts, embed
from diffumask_fast.generation.job import Job
from diffumask_fast.generation.options import PromptOptions
from diffumask_fast.models.lora import lora_record
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.caption_file import CaptionFile
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.english import article
from diffumask_fast.prompts.planner import Recipe
from diffumask_fast.prompts.retrieval import Best, CaptionMatcher, Retrieved, chance

if TYPE_CHECKING:
    from diffumask_fast.generation.cluster import Cluster

logger = logging.getLogger("diffumask_fast")

FEWEST = 10  # captions of a class; with fewer, its prompts are made of templates
MOST_TOLD = 8  # classes in one line
_JOIN = "\n"  # of class names in an index


def with_captions(
    job: Job,
    options: PromptOptions,
    pipe: DiffuMaskPipeline | Cluster,
    folder: Place | None = None,
    progress: Callable[[int | None], Progress] = lambda total: Progress(disable=True),
) -> Job:
    """Return the job with captions of the file that the options name, if they name one.

    A run that was begun keeps its captions in its folder: it goes on with them, also where the file is gone.

    Args:
        job: without captions.
        options: the flags.
        pipe: whose text encoder tells which captions are near to a class.
        folder: of the run; None where there is none.
        progress: makes a progress bar, which counts the captions that are embedded.

    Raises:
        DiffuMaskError: the file cannot be read, or no class has enough captions in it.
    """
    if options.captions is None:
        return job
    method, path = options.retrieval, Path(options.captions).expanduser()
    if method == "auto":
        method = "embedding" if _compares_texts(pipe) else "words"
    kept = _kept(job, options, method, folder) if folder is not None else None
    if kept is not None and not path.exists():
        logger.warning("%s is gone: the captions that %s has kept are taken", path, folder)
        return _with(job, kept)
    file = CaptionFile(path)
    source = file.sha256()
    if kept is None or kept.source != source:
        asked = Retrieved(source, method, options.captions_per_class, options.caption_filter, ())
        index = None
        if method == "embedding" and job.weights is not None:
            phrases = [(entry.name, entry.phrases) for entry in job.recipe.vocabulary.entries]
            recipe = (phrases, job.recipe.classes_per_image, options.caption_filter)
            index = index_path(source, job.weights, job.engine_sha256, *recipe, *lora_record(job.loras).values())
        with progress(None) as bar:
            task = bar.add_task("embedding captions", total=None)

            def embedded(texts: Sequence[str]) -> np.ndarray:
                vectors = embed(pipe, texts) if isinstance(pipe, DiffuMaskPipeline) else pipe.embed(texts)
                bar.advance(task, len(texts))
                return vectors

            kept = retrieve(file, asked, job.recipe, pipe.tokenizer, embedded, index)
    return _with(job, kept)


def retrieve(
    file: CaptionFile, asked: Retrieved, recipe: Recipe, tokenizer: Any, embed: Embed, index: Path | None = None
) -> Retrieved:
    """Find the best captions of each class, or of each combination of as many classes as an image has.

    Args:
        file: where they are.
        asked: how they are to be found; without captions.
        recipe: whose classes they are to name.
        tokenizer: of the text encoder, which must see the words of the classes.
        embed: gives the vectors of texts.
        index: where these are kept; None keeps none.

    Raises:
        DiffuMaskError: the file cannot be read, or holds too few captions of every class.
    """
    matcher = CaptionMatcher(recipe.vocabulary, recipe.classes_per_image, asked.caption_filter)
    best: dict[str, Best] = {}
    if asked.method == "words":
        for caption, names in _matches(file, matcher):
            best.setdefault(names, Best(asked.per_class)).add(chance(caption), caption)
    else:
        wanted: dict[str, np.ndarray] = {}
        for captions, classes, vectors in read_or_make(index, lambda: _matches(file, matcher), embed):
            groups = np.asarray(classes)
            for names in dict.fromkeys(classes):
                if names not in wanted:
                    wanted[names] = embed([_base_prompt(recipe, names)])[0].astype(np.float32)
                rows = np.flatnonzero(groups == names)
                scores = vectors[rows].astype(np.float32) @ wanted[names]
                texts = (captions[row] for row in rows)
                best.setdefault(names, Best(asked.per_class)).add_all(zip(scores.tolist(), texts, strict=True))
    speller, found = Speller(tokenizer), []
    for names in sorted(best):
        entries = [recipe.vocabulary[name] for name in names.split(_JOIN)]
        prompts = _fitting(speller, [matcher.prompt(caption) for caption in best[names].ranked()], entries)
        if len(prompts) >= FEWEST:
            found.append((tuple(names.split(_JOIN)), tuple(prompts)))
    _tell_lacking(file.path, recipe, [names for names, _ in found])
    return replace(asked, captions=tuple(found))


def kept_captions(folder: Place, manifest: Mapping[str, Any]) -> Retrieved | None:
    """Read the captions that a dataset was drawn from; None where it was drawn without a caption file.

    Raises:
        DiffuMaskError: they are missing, or others than those that it was drawn from.
    """
    recorded, path = manifest["options"].get("retrieved"), folder / CAPTIONS
    if recorded is None:
        return None
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == recorded:
            return Retrieved.from_bytes(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffuMaskError(f"{path} is missing or cannot be read: bring it back") from error
    raise DiffuMaskError(f"{path} is not what {folder} was drawn from: bring back the file as it was written")


def _kept(job: Job, options: PromptOptions, method: str, folder: Place) -> Retrieved | None:
    """Return the captions that were found for a run that was begun by the same options, if there is one."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    there = manifest["options"]
    same = {
        "retrieval": method, "captions_per_class": options.captions_per_class,
        "caption_filter": options.caption_filter, "classes_per_image": job.recipe.classes_per_image,
    }  # fmt: skip
    classes = [entry.as_json() for entry in job.recipe.vocabulary.entries]
    if any(there.get(name) != value for name, value in same.items()) or manifest["classes"] != classes:
        return None
    if manifest["model"].get("weights") != job.weights:
        return None
    try:
        return kept_captions(folder, manifest)
    except DiffuMaskError:
        if options.captions is not None and Path(options.captions).expanduser().exists():
            return None
        raise


def _with(job: Job, retrieved: Retrieved) -> Job:
    return replace(job, recipe=replace(job.recipe, retrieved=retrieved))


def _compares_texts(pipe: DiffuMaskPipeline | Cluster) -> bool:
    return compares_texts(pipe) if isinstance(pipe, DiffuMaskPipeline) else pipe.compares_texts


def _matches(file: CaptionFile, matcher: CaptionMatcher) -> Iterator[tuple[str, str]]:
    """Yield the captions that serve classes, with the names of these, and tell how many lines are none."""
    read = 0
    for caption in file:
        read += 1
        if names := matcher.match(caption):
            yield caption, _JOIN.join(names)
    file.check_unchanged()
    if file.skipped:
        logger.warning("%s: %d captions; %d more are not readable text and are skipped", file.path, read, file.skipped)


def _base_prompt(recipe: Recipe, names: str) -> str:
    """Return the prompt to which captions of classes are to be near."""
    return f"a photo of {' and '.join(article(recipe.vocabulary[name].phrase) for name in names.split(_JOIN))}"


def _fitting(speller: Speller, prompts: Sequence[str], entries: Sequence[ClassEntry]) -> list[str]:
    """Return the prompts in which words of all classes are among the tokens that the text encoder sees."""
    if not prompts:
        return []
    tokenizer, words = speller.tokenizer, cache(speller.words)
    encoded = tokenizer(list(prompts), max_length=tokenizer.model_max_length, truncation=True)["input_ids"]
    return [
        prompt
        for prompt, spelt in zip(prompts, map(speller.spelt, encoded), strict=True)
        if all(spelt.occurrences(words(entry.phrase_in(prompt))) for entry in entries)
    ]


def _tell_lacking(path: Path, recipe: Recipe, found: Sequence[tuple[str, ...]]) -> None:
    """Name the classes that have too few captions.

    Raises:
        DiffuMaskError: all have.
    """
    names, each = recipe.vocabulary.names, recipe.classes_per_image
    if not found:
        raise DiffuMaskError(
            f"{path} has no {FEWEST} captions of any of {', '.join(names[:MOST_TOLD])} that fit: name other classes, "
            "say `caption_filter=none`, or leave out `captions`"
        )
    if each > 1:
        logger.warning(
            "%d of the %d combinations of classes have captions; the others are drawn from templates",
            len(found), comb(len(names), each),
        )  # fmt: skip
    elif lacking := [name for name in names if (name,) not in found]:
        more = f" and {len(lacking) - MOST_TOLD} more" if len(lacking) > MOST_TOLD else ""
        logger.warning(
            "fewer than %d captions fit %s%s: drawn from templates", FEWEST, ", ".join(lacking[:MOST_TOLD]), more
        )
