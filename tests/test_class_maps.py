"""dropin/class_maps.py: the tokens and levels of a class, and the map that they become."""

import torch

from diffumask_fast.dropin.class_maps import class_levels, fuse, word_tokens


def test_levels_are_counted_from_the_coarsest():
    sd, mini, two, one = ([str(i) for i in range(n)] for n in (4, 3, 2, 1))
    assert [class_levels("cow", keys) for keys in (sd, mini, two, one)] == [["0", "1", "2"], ["0", "1"], ["0"], ["0"]]
    for name in ("sofa", "train", "tvmonitor"):
        assert [class_levels(name, keys) for keys in (sd, mini, two, one)] == [["3"], ["2"], ["1"], ["0"]]
    assert [class_levels("diningtable", keys) for keys in (sd, mini, two, one)] == [["2"], ["1"], ["0"], ["0"]]
    assert class_levels("cow", ["10", "9", "2"]) == ["2", "9"]


def test_a_map_without_attention_is_zero():
    assert fuse([torch.zeros(2, 4, 4), torch.zeros(2, 8, 8)]).abs().max() == 0


def test_words_as_clip_splits_them(tokenizer):
    assert word_tokens(tokenizer, "a photo of a dog and the dog on a cat") == {11: [5, 8], 7: [11]}
    assert word_tokens(tokenizer, "a dining table and a potted plant") == {10: [4], 15: [7, 8, 9]}
    assert word_tokens(tokenizer, "grass on the street") == {}
    long = "the red " * 40
    assert word_tokens(tokenizer, f"a dog {long}and a cat") == {11: [2]}
