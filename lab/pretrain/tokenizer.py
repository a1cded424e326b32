"""A small CLIP tokenizer: byte-level BPE, so that any text has tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.pretrain.captions import caption
from lab.pretrain.data import training_scene
from lab.pretrain.names import rare_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 32
MERGES = 1200
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

_WORD_LIST = """
sks toy robot rocket duck dog cat bird person man woman child backpack cup bowl vase lamp chair
table clock shoe boat train plane flower apple banana cake street city room kitchen garden jungle
mountain river rain fire moon sun cloud tiny huge little old new shiny wooden metal plastic glass
silver gold grey gray teal cyan magenta turquoise violet beige bright dark light painting drawing
sketch watercolor oil pencil style cartoon poster sticker photograph photo picture image rendering
best quality low high detailed blurry bad beautiful and with without wearing holding sitting
standing next to under over behind between left right top bottom many two three
"""
WORDS = _WORD_LIST.split()
"""Words that people try in prompts; each becomes one token."""


def sentences() -> list[str]:
    """Text to learn a tokenizer from: captions, and every word that is to be one token."""
    generator = np.random.default_rng(6)
    captions = [caption(training_scene(i), generator) for i in range(6000)]
    # 40 repeats: enough for every listed word to be merged into one token.
    return captions + [" ".join(WORDS)] * 40 + [" ".join(rare_words())] * 10


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the merges and write the tokenizer's files, the two classic ones included."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(sentences(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += list(dict.fromkeys(a + b for a, b in merges if a + b not in set(tokens)))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    arguments: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    tokenizer = CLIPTokenizer(**arguments, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    # Recent transformers write tokenizer.json alone; older ones read only these two.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    return tokenizer
