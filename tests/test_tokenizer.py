from transformers import CLIPTokenizer

from diffumask_fast.mini.tokenizer import LEXICON, byte_alphabet, learn_merges, write_tokenizer
from diffumask_fast.mini.world import SCENES, VOC


def test_words_of_the_world_are_whole_and_others_are_spelt(tmp_path):
    size = write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size and tokenizer.model_max_length == 77
    assert tokenizer.tokenize("a photo of a dog") == ["a</w>", "photo</w>", "of</w>", "a</w>", "dog</w>"]
    assert tokenizer.tokenize("potted plant") == ["potted</w>", "plant</w>"]
    assert len(tokenizer.tokenize("aeroplane")) > 1 and len(tokenizer.tokenize("zebra")) > 1
    for text in [*(entry.phrase for entry in VOC.values()), *SCENES.values(), "Ünïcode 漢字 🐕"]:
        ids = tokenizer(text).input_ids
        assert len(set(ids)) > 2 and tokenizer.decode(ids[1:-1]).strip() == text.lower()


def test_ids_differ_between_words(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len({tuple(tokenizer(word).input_ids) for word in LEXICON}) == len(LEXICON)


def test_the_alphabet_has_one_printable_character_for_each_byte():
    assert len(set(byte_alphabet())) == 256 and all(char.isprintable() and char != " " for char in byte_alphabet())


def test_merges_are_learnt_in_order_of_frequency():
    assert learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
