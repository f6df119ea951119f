"""docs/troubleshooting.md: every error sentence is there, or says itself what to do; what is quoted is said."""

import re
from functools import cache

from error_sentences import HOLE, ROOT, all_texts, sentences

from diffumask_fast.errors import as_flags

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HELP = "end it with a colon and what to do (a verb of the first table), or give docs/troubleshooting.md an entry"


def section(title: str) -> str:
    return PAGE[PAGE.index(f"\n## {title}") :].split("\n## ", 2)[1]


def verbs() -> set[str]:
    rows = re.findall(r"^\| ([a-z, ]+) \| ", section("What a sentence asks for"), re.MULTILINE)
    return {verb for row in rows[1:] for verb in row.split(", ")}


@cache
def quotes() -> dict[str, re.Pattern[str]]:
    """Return what the page quotes, and what it matches: `...` is anything."""
    found = [" ".join(quote.split()) for quote in re.findall(r'"([^"]+)"', PAGE) if " " in quote]
    return {quote: pattern(quote) for quote in found}


def pattern(quote: str) -> re.Pattern[str]:
    parts = (re.escape(part.strip()) for part in re.sub(r"(?<!\.)\.$", "", quote.replace("`", "")).split("..."))
    return re.compile(".*".join(parts) + r"\.?$", re.DOTALL)


def forms(text: str) -> set[str]:
    """Return a sentence as Python says it and as the command line does."""
    return {text.replace("`", ""), as_flags(text).replace("`", "")}


def says_what_to_do(sentence: str) -> bool:
    return any(word in verbs() for word in re.findall(r"[:;] ([a-z]+)\b", sentence))


def is_told(sentence: str) -> bool:
    return any(found.match(form) for found in quotes().values() for form in forms(sentence))


def test_every_error_sentence_says_what_to_do_or_is_on_the_page():
    untold = {place: text for place, text in sentences().items() if not says_what_to_do(text) and not is_told(text)}
    assert not untold, HELP


def test_the_page_quotes_what_the_program_says():
    said = [form for text in all_texts() for form in forms(text)]
    assert [quote for quote, found in quotes().items() if not any(map(found.match, said))] == []
    begun = " ".join(sentences().values())
    assert [verb for verb in sorted(verbs()) if not re.search(rf"[:;] {verb}\b", begun)] == []


def test_an_entry_is_of_few_sentences():
    said = [forms(text) for text in sentences().values() if not says_what_to_do(text)]
    assert max(sum(any(map(found.match, one)) for one in said) for found in quotes().values()) < 25


def test_sentences_are_found_and_gaps_are_seen():
    found = set(sentences().values())
    assert len(found) > 450 and len(verbs()) > 40 and len(quotes()) > 100
    assert f"{HOLE} is a link, and writing does not follow links: move it away" in found  # of an f-string
    assert f"xformers runs on CUDA alone, and the device is {HOLE}: use `attention=sdpa`." in found  # with a constant
    assert f"There is no command {HOLE}: {HOLE} lists all." in found  # of a function that returns it
    assert f"{HOLE} is no key here: there are {HOLE}" in found  # handed on
    assert says_what_to_do("the disk is full: free some") and not says_what_to_do("the disk is full: alas")
    assert is_told(f"diffusers cannot load {HOLE}: {HOLE}") and not is_told("the disk is full")
    assert pattern("... give a `--shard-size` up to ...").match(as_flags(f"{HOLE}: give a `shard_size` up to {HOLE}"))
