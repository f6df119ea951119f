"""attention/spelling.py: words among the tokens of large vocabularies, compared with the tokenizers' offsets."""

import random
import re

import pytest
import vocabularies

from diffumask_fast.attention.phrases import PhraseNotFound, phrase_positions

RARE = "Rottweiler xylophone zebra tvmonitor aeroplane hotdog"
LATIN = f"{RARE} dog dogs cat category car cars scar sofa DOG iPhone ice-cream well-known mother's rock'n'roll".split()
OTHER = "Straße Hündchen café crème façade naïve собака кошка 犬 猫 狗 沙发 公共汽车 黒い犬 42 2nd".split()
PHRASES = [*LATIN, *OTHER, "potted plant", "the dog", "dining table", "ice cream", "red car", "café crème", "(dog)"]
BETWEEN = [
    " ",
    " ",
    " ",
    ", ",
    ". ",
    " (",
    ") ",
    "-",
    "/",
    ' "',
    '" ',
    "! ",
    ":1.3 ",
    "'s ",
    "_",
    "\n",
    "  ",
    " “",
    "” ",
    "…",
]


def new_prompt(chosen):
    """Return a prompt and the words it is made of."""
    words, prompt = [], ""
    for _ in range(chosen.randint(2, 8)):
        word = chosen.choice(PHRASES)
        if "ß" not in word:  # whose capitals are two letters
            word = chosen.choice([word, word, word.upper(), word.capitalize()])
        glued = prompt and prompt[-1].isascii() and prompt[-1].isalpha() and word.isascii() and word.isalpha()
        prompt += word + ("" if glued and chosen.random() < 0.1 else chosen.choice(BETWEEN))
        words.append(word)
    return prompt, words


def by_offsets(tokenizer, prompt, phrase):
    """Return the ids, and the tokens of a phrase as a whole word, by the places in the prompt that they are of.

    What the tokenizer does not know may be a letter: neither that nor a word beside it counts. For WordPiece it is
    a word, and ideographs are words by themselves.
    """
    coded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    pattern = re.escape(phrase).replace(r"\ ", r"\s+")
    found, last = set(), 0
    has_unknown = tokenizer.unk_token != tokenizer.eos_token
    unknown = {at for at, one in enumerate(coded.input_ids) if has_unknown and one == tokenizer.unk_token_id}
    is_apart = tokenizer.unk_token == "[UNK]"
    blurred = set() if is_apart else {place for at in unknown for place in range(*coded.offset_mapping[at])}
    if has_unknown and tokenizer.unk_token_id in tokenizer(phrase).input_ids:
        return coded.input_ids, []
    for match in re.finditer(pattern, prompt, re.IGNORECASE):
        start, end = match.span()
        if (
            start < last
            or any(is_inside_a_word(prompt, at) for at in (start, end))
            or blurred & beside(prompt, start, end)
        ):
            continue
        tokens, letters = set(), ""
        for at, (left, right) in enumerate(coded.offset_mapping):
            inside = prompt[max(left, start) : min(right, end)]
            if inside.strip() and coded.tokens()[at] not in ("▁", "Ġ"):
                tokens.add(at)
                letters += prompt[left : max(left, start)] + prompt[min(right, end) : right]
        if tokens.isdisjoint(unknown) and not any(c.isalnum() for c in letters):
            found |= tokens
            last = end
    return coded.input_ids, sorted(found)


def beside(text, start, end):
    """Return the places before and after a word, where they may belong to it."""
    letters = {start - 1: text[start], end: text[end - 1]}
    return {at for at, letter in letters.items() if letter.isalnum() and letter < "\u2e80"}


def is_inside_a_word(text, at):
    return 0 < at < len(text) and all(c.isalnum() and c < "\u2e80" for c in text[at - 1 : at + 1])


@pytest.fixture(scope="module", params=vocabularies.KINDS)
def tokenizer(request):
    made = vocabularies.KINDS[request.param]()
    assert len(made) > 2300
    return made


def test_words_are_where_the_offsets_say(tokenizer):
    chosen, seen = random.Random(0), []
    for _ in range(800):
        prompt, words = new_prompt(chosen)
        phrase = chosen.choice(words if chosen.random() < 0.7 else PHRASES)
        ids, expected = by_offsets(tokenizer, prompt, phrase)
        try:
            found = phrase_positions(tokenizer, [ids], [prompt], [[phrase]])[0][0]
        except PhraseNotFound:
            found = []
        assert found == expected, (prompt, phrase, tokenizer.convert_ids_to_tokens(ids))
        seen.append(len(found))
    assert sum(n > 0 for n in seen) > 350 and sum(n > 4 for n in seen) > 50 and seen.count(0) > 100


@pytest.mark.parametrize(
    ("kind", "prompt", "phrase", "tokens"),
    [
        ("WordPiece", "a category, a cat", "cat", ["cat"]),
        ("WordPiece", "the zebra's (Zebra)", "zebra", None),
        ("SentencePiece", "“dog”, dog's bone", "dog", None),
        ("SentencePiece with bytes", "a 鸡 on 鸡蛋", "鸡", ["<0xE9>", "<0xB8>", "<0xA1>"] * 2),
        ("byte-level", "“dog”\ndog…dog", "dog", None),
        ("CLIP", "“dog” DOG-dog", "dog", ["dog</w>"] * 3),
    ],
)
def test_tokens_of_the_phrase(kind, prompt, phrase, tokens):
    tokenizer = vocabularies.KINDS[kind]()
    ids, expected = by_offsets(tokenizer, prompt, phrase)
    found = phrase_positions(tokenizer, [ids], [prompt], [[phrase]])[0][0]
    assert found == expected
    if tokens is not None:
        assert tokenizer.convert_ids_to_tokens([ids[at] for at in found]) == tokens


def test_what_the_tokenizer_does_not_know_is_said():
    tokenizer = vocabularies.KINDS["SentencePiece"]()
    prompt = "a 鸡 and a dog"
    with pytest.raises(PhraseNotFound, match="the phrase '鸡' is not known to the tokenizer"):
        phrase_positions(tokenizer, [tokenizer(prompt).input_ids], [prompt], [["鸡"]])
