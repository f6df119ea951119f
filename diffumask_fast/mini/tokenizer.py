"""Write the CLIP tokenizer folder of the embedded model: byte-level BPE with a small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from diffumask_fast.mini.world import SCENES, VOC

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
COLOURS = "red green blue yellow orange purple brown black white grey".split()
# without "aeroplane": so one class name is a word of several tokens, as rare words are for CLIP
LEXICON = sorted(
    {word for entry in VOC.values() for word in entry.phrase.split() if entry.name != "aeroplane"}
    | {word for phrase in SCENES.values() for word in phrase.split()}
    | {*COLOURS, *"a an and of photo picture two with plane no people street scene".split()}
)


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for the bytes, in byte order (GPT-2's mapping)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that make each word one token: the most frequent pair first, ties in sorted order."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(folder: Path) -> int:
    """Write `vocab.json`, `merges.txt` and the configuration; return the size of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, merges = byte_alphabet(), learn_merges(LEXICON)
    tokens = alphabet + [char + "</w>" for char in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    tokens = list(dict.fromkeys(tokens))
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "add_prefix_space": False,
        "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS, "errors": "replace",
    }  # fmt: skip
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    return len(tokens)
