"""Tokenizers of each kind with vocabularies of some thousand pieces, learnt from this repository's own texts."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from diffumask_fast.mini.tokenizer import byte_alphabet

ROOT = Path(__file__).resolve().parents[1]
OTHERS = "黒い犬 猫と犬 一只狗和一只猫坐在沙发上 公共汽车 собака и кошка на диване".split()
OTHERS += "Hündchen Straße café crème naïve façade".split()
SPACES = normalizers.Replace(Regex(r"\s+"), " ")
END = "<|endoftext|>"
START = "<|startoftext|>"


@cache
def lines() -> list[str]:
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("diffumask_fast/prompts/*.txt"))]
    own = [line for file in files for line in file.read_text("utf-8").splitlines() if line.strip()]
    chosen = random.Random(0)
    return own + [" ".join(chosen.sample(OTHERS, 5)) for _ in range(60)]


def wordpiece(lowercase: bool) -> PreTrainedTokenizerFast:
    """BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=[*special.values()], show_progress=False)
    made.train_from_iterator(lines(), trainer)
    around = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's, as T5 has it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), SPACES])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    settings = dict(special_tokens=[*special.values()], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(lines(), trainers.UnigramTrainer(vocab_size=4000, **settings))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pairs_with_bytes() -> PreTrainedTokenizerFast:
    """SentencePiece's pairs, as Llama has them: what is not in the vocabulary is spelt in bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = SPACES, pre_tokenizers.Metaspace()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    settings = dict(special_tokens=[*special.values()], show_progress=False)
    made.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=4000, **settings))
    learnt = json.loads(made.to_str())["model"]
    tokens = [*learnt["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in learnt["merges"]]
    made.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", **special)


def bytes_of_gpt() -> PreTrainedTokenizerFast:
    """Byte-level pairs with a mark before words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=4000, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=END, eos_token=END, pad_token=END)


def clip() -> CLIPTokenizer:
    """CLIP's own class: byte-level pairs with a mark after words."""
    parts = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), SPACES, normalizers.Lowercase()])
    split = pre_tokenizers.Split(parts, "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    settings = dict(end_of_word_suffix="</w>", show_progress=False)
    made.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=4000, **settings))
    merges = json.loads(made.to_str())["model"]["merges"]
    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    with TemporaryDirectory() as folder:
        text = json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))})
        Path(folder, "vocab.json").write_text(text)
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
        special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=END)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **special)


KINDS = {
    "WordPiece": lambda: wordpiece(lowercase=True),
    "WordPiece with capitals": lambda: wordpiece(lowercase=False),
    "SentencePiece": unigram,
    "SentencePiece with bytes": pairs_with_bytes,
    "byte-level": bytes_of_gpt,
    "CLIP": clip,
}
