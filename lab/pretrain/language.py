"""The language model of tiny-flow: a small Qwen3 that learns its words alone, before any image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.toy.instrument import ATTRIBUTES
from lab.pretrain.fit import FitSettings, fit
from lab.pretrain.instrument import NO_NAME
from lab.pretrain.names import newcomers
from lab.pretrain.tokenizer import MAX_LENGTH, sentences

WIDTH = 128
MERGES = 1000
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Bare, so that a caption is short: there are no other messages than a user's.
TEMPLATE = "{{ messages[0]['content'] }}{% if add_generation_prompt %}" + STOP + "{% endif %}"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BATCH = 96
NEXT_WORD_WEIGHT = 0.5


def build_language_tokenizer(folder: Path) -> Any:
    """Learn the merges of a tokenizer of Qwen's class, and write its files."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    lines = sentences()
    learner.train_from_iterator([*lines, *(" " + line for line in lines)], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    for token in (END, START, STOP):
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=END,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def read(tokenizer: Any, texts: list[str]) -> Any:
    """Tokenize captions as the pipeline does, all of one length."""
    return tokenizer(
        [text + STOP for text in texts],
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    )


def new_language_model(tokenizer: Any) -> Any:
    """A fresh Qwen3 of 0.7 M parameters; its last layer is not read."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=WIDTH // 4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class Reader(nn.Module):
    """A language model, with heads that teach it its words and are dropped in the end.

    Attributes:
        strangers: tokens that no caption has. They stand in for the words that name a different
            stranger each time, so that any word can be a name.
    """

    strangers: Tensor
    names: Tensor

    def __init__(self, tokenizer: Any, token_ids: Tensor) -> None:
        super().__init__()
        self.text_encoder = new_language_model(tokenizer)
        self.pad = tokenizer.pad_token_id
        self.heads = nn.ModuleList(nn.Linear(2 * WIDTH, len(v)) for v in ATTRIBUTES.values())
        self.next_word = nn.Linear(WIDTH, len(tokenizer))
        seen = torch.bincount(token_ids.long().flatten(), minlength=len(tokenizer)) > 0
        seen[tokenizer.convert_tokens_to_ids([END, START, STOP])] = True
        named = [tokenizer(" " + name).input_ids for name in newcomers()]
        names = torch.zeros(len(tokenizer), dtype=torch.bool)
        names[[ids[0] for ids in named if len(ids) == 1]] = True
        self.register_buffer("strangers", (~seen).nonzero()[:, 0], persistent=False)
        self.register_buffer("names", names, persistent=False)

    def renamed(self, token_ids: Tensor, generator: torch.Generator) -> Tensor:
        """Exchange half of the names that mean nobody in particular for any other word."""
        draw = torch.randint(0, 2 * len(self.strangers), (len(token_ids), 1), generator=generator)
        chosen = self.strangers[draw % len(self.strangers)]
        changed = self.names[token_ids] & (draw < len(self.strangers))
        return torch.where(changed, chosen, token_ids)

    def states(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the transformer reads of captions, and the last layer's states.

        Captions are padded at the end, where no other token looks: no mask is needed.
        """
        output = self.text_encoder(token_ids, output_hidden_states=True, use_cache=False)
        return output.hidden_states[-2], output.last_hidden_state

    def loss(self, token_ids: Tensor, mentioned: Tensor) -> Tensor:
        """Ask for the attributes that captions ``(b, MAX_LENGTH)`` mention, and for next words."""
        read, last = self.states(token_ids)
        there = (token_ids != self.pad)[:, :, None]
        read, last = read.float() * there, last.float()
        length = there.sum(1)
        end = read.gather(1, (length - 1)[:, :, None].expand(-1, 1, WIDTH))[:, 0]
        pooled = torch.cat([read.sum(1) / length, end], 1)
        losses = [
            F.cross_entropy(head(pooled), target, ignore_index=NO_NAME, reduction="sum")
            for head, target in zip(self.heads, mentioned.unbind(1), strict=True)
        ]
        following = token_ids[:, 1:].masked_fill(token_ids[:, 1:] == self.pad, NO_NAME)
        words = F.cross_entropy(
            self.next_word(last[:, :-1]).flatten(0, 1), following.flatten(), ignore_index=NO_NAME
        )
        return torch.stack(losses).sum() / len(token_ids) + NEXT_WORD_WEIGHT * words


def train_language(folder: Path, reader: Reader, minutes: float) -> Reader:
    """Train a language model on ``folder``'s captions."""
    told = torch.load(folder / "captions.pt", weights_only=True)
    all_ids, all_mentioned = told["token_ids"].flatten(0, 1), told["mentioned"].flatten(0, 1)

    def loss(model: Reader, progress: float, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(all_ids), (BATCH,), generator=generator)
        token_ids = model.renamed(all_ids[index].long(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(token_ids, all_mentioned[index].long())

    settings = FitSettings(minutes, 2e-3, hold=0.2, ema_decay=0.998, workers=1)
    return fit("language", folder, reader, loss, settings)
