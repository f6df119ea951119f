import pytest
import torch

from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns, token_columns
from diffumask_fast.errors import DiffuMaskError


def columns(tokenizer, prompt, *phrases, **kwargs):
    return phrase_columns(tokenizer, [prompt], list(phrases), length=77, **kwargs)[0]


def positions(column):
    return column.nonzero().flatten().tolist()


def test_one_word(tokenizer):
    select = columns(tokenizer, "a photo of a dog on the grass", "dog")
    assert select.shape == (77, 1) and select.dtype == torch.float32
    assert positions(select[:, 0]) == [5] and select[5, 0] == 1


def test_a_word_of_several_tokens_and_a_phrase_of_several_words(tokenizer):
    assert tokenizer.tokenize("potted") == ["pot", "ted</w>"]
    select = columns(tokenizer, "a photo of a potted plant, on the dining table", "potted plant", "dining table", "on")
    assert [positions(c) for c in select.T] == [[5, 6, 7], [11, 12, 13], [9]]
    assert torch.allclose(select.sum(0), torch.ones(3)) and torch.allclose(select[5:8, 0], torch.tensor(1 / 3))


def test_all_occurrences_share_the_weight(tokenizer):
    select = columns(tokenizer, "dog and cat and dog, the dog", "dog", "and")
    assert positions(select[:, 0]) == [1, 5, 8] and torch.allclose(select[[1, 5, 8], 0], torch.tensor(1 / 3))
    assert positions(select[:, 1]) == [2, 4]


def test_occurrences_do_not_overlap(tokenizer):
    assert positions(columns(tokenizer, "dog dog dog", "dog dog")[:, 0]) == [1, 2]


@pytest.mark.parametrize("prompt", ["A Photo Of A DOG", "a photo of a dog.", "a photo of a (dog)", "red,dog"])
def test_case_and_punctuation_do_not_matter(tokenizer, prompt):
    for phrase in ("dog", "Dog", " dog "):
        assert columns(tokenizer, prompt, phrase).sum() == 1


@pytest.mark.parametrize(
    ("prompt", "phrase"), [("potted", "ted"), ("dogs", "dog"), ("scar", "car"), ("a dog", "a cat")]
)
def test_parts_of_words_are_not_found(tokenizer, prompt, phrase):
    with pytest.raises(PhraseNotFound, match=f"'{phrase}' is not there as whole words, in the prompt '{prompt}'") as e:
        columns(tokenizer, prompt, phrase)
    assert e.value.phrase == phrase and e.value.prompt == prompt and not e.value.truncated


def test_a_word_that_ends_like_the_phrase_does_not_count(tokenizer):
    assert tokenizer.tokenize("scar") == ["s", "car</w>"]
    assert positions(columns(tokenizer, "scar car", "car")[:, 0]) == [3]


def test_the_last_position_is_the_end_token(tokenizer):
    words = ["on"] * 74
    assert positions(columns(tokenizer, " ".join([*words, "dog"]), "dog")[:, 0]) == [75]
    with pytest.raises(PhraseNotFound, match="'dog' is only past token 77") as e:
        columns(tokenizer, " ".join([*words, "on", "dog"]), "dog")
    assert e.value.truncated
    with pytest.raises(PhraseNotFound, match="only past token 77"):
        columns(tokenizer, " ".join([*words, "potted"]), "potted")


def test_only_the_occurrences_that_are_seen_count(tokenizer):
    select = columns(tokenizer, " ".join(["dog", *["on"] * 80, "dog"]), "dog")
    assert positions(select[:, 0]) == [1] and select[1, 0] == 1


def test_length_is_what_the_unet_sees(tokenizer):
    prompt = " ".join([*["on"] * 20, "dog"])
    assert phrase_columns(tokenizer, [prompt], ["dog"], length=32).shape == (1, 32, 1)
    with pytest.raises(PhraseNotFound, match="past token 16"):
        phrase_columns(tokenizer, [prompt], ["dog"], length=16)


def test_mixed_prompts_are_padded(tokenizer):
    prompts, phrases = ["a dog and a cat", "the sofa", "red"], [["dog", "cat"], ["sofa"], []]
    select = phrase_columns(tokenizer, prompts, phrases, length=77, pad_to=3)
    assert select.shape == (3, 77, 3)
    assert select.sum(1).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert phrase_columns(tokenizer, prompts, phrases, length=77).shape[-1] == 2


def test_one_list_counts_for_all_prompts(tokenizer):
    select = phrase_columns(tokenizer, ["a dog", "the red dog"], ["dog"], length=77)
    assert [positions(c) for c in select[..., 0]] == [[2], [3]]


def test_wrong_phrases_are_named(tokenizer):
    with pytest.raises(DiffuMaskError, match="1 lists of phrases for 2 prompts"):
        phrase_columns(tokenizer, ["a dog", "a cat"], [["dog"]], length=77)
    with pytest.raises(DiffuMaskError, match="not a mixture"):
        phrase_columns(tokenizer, ["a dog", "a cat"], ["dog", ["cat"]], length=77)
    with pytest.raises(DiffuMaskError, match="there are no phrases"):
        phrase_columns(tokenizer, ["a dog"], [], length=77)
    with pytest.raises(DiffuMaskError, match="has 2 phrases, room was asked for 1"):
        phrase_columns(tokenizer, ["a dog"], ["a", "dog"], length=77, pad_to=1)
    with pytest.raises(PhraseNotFound):
        phrase_columns(tokenizer, ["a dog"], [""], length=77)
    for wrong in (None, 5, [5], [None], b"dog", [["dog", 5]], [b"dog"]):
        with pytest.raises(DiffuMaskError, match="give a list of words|give words of the prompt"):
            phrase_columns(tokenizer, ["a dog"], wrong, length=77)


def test_given_positions_are_checked():
    assert token_columns([[[2, 3]]], length=8)[0, :, 0].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    for wrong in ([8], [-1], []):
        with pytest.raises(DiffuMaskError, match="not among 0 to 7"):
            token_columns([[wrong]], length=8)
