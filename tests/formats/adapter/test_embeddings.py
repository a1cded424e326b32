"""Files of trained words, read by the published rules of other programs."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.adapter.embeddings import (
    are_equal,
    embedding_files,
    read_embedding,
    write_embeddings,
)
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.layouts import FACTS
from dora_diffusion.numerics.weights import LayerWeights
from tests.families import UNETS

WIDTHS = {"sd1": [768], "sd2": [1024], "sdxl": [768, 1280]}
# What ComfyUI's text encoders ask a file for, in their order.
COMFYUI_KEYS = {"sd1": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}
FAMILY_NAMES = sorted(UNETS)


def kind_of(family: Family) -> str:
    return next(kind for kind in ("sdxl", "sd2", "sd1") if family.name.startswith(kind))


def vectors_for(family: Family, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        name: torch.randn(*shape, width)
        for name, width in zip(family.text_encoder_names, WIDTHS[kind_of(family)], strict=True)
    }


def in_comfyui(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The key, that of a bundle, or else the first tensor."""
    if key in tensors:
        return tensors[key]
    found = [t for k, t in tensors.items() if k.startswith("bundle_emb.") and k.endswith(f".{key}")]
    return torch.cat(found) if found else next(iter(tensors.values()))


def in_invokeai(tensors: Mapping[str, Tensor]) -> tuple[str, list[Tensor]]:
    """The base that it finds, and the vectors, of which the second encoder's are first."""
    names = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
    if "emb_params" in tensors:
        return names[tensors["emb_params"].shape[-1]], [tensors["emb_params"]]
    if "clip_g" in tensors:
        pair = [tensors["clip_l"], tensors["clip_g"]]
        return names[tensors["clip_g"].shape[-1]], pair
    (tensor,) = tensors.values()
    return names[tensor.shape[0]], [tensor]


def in_a1111(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    if {"clip_l", "clip_g"} <= tensors.keys():
        return [tensors["clip_l"], tensors["clip_g"]]
    (tensor,) = tensors.values()
    return [tensor if tensor.ndim == 2 else tensor[None]]


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (4,)])
def test_a_words_file_is_read_by_every_program(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    family = FAMILIES[name]
    vectors = vectors_for(family, shape)
    wanted = [tensor.view(-1, tensor.shape[-1]) for tensor in vectors.values()]
    files = embedding_files(tmp_path, "", ["<bolt>"])
    write_embeddings(files, {"<bolt>": vectors})
    tensors = load_file(files["<bolt>"])
    base, in_invoke = in_invokeai(tensors)
    assert base == kind_of(family)
    keys = COMFYUI_KEYS[kind_of(family)]
    for read in (in_invoke, in_a1111(tensors), [in_comfyui(tensors, key) for key in keys]):
        assert all(torch.equal(a, b) for a, b in zip(read, wanted, strict=True))
    (token, again), = read_embedding(files["<bolt>"]).items()  # fmt: skip
    assert token == "<bolt>"
    assert again.keys() == vectors.keys()
    assert are_equal(again, vectors)
    assert all(torch.equal(again[n], rows) for n, rows in zip(vectors, wanted, strict=True))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_bundled_word_is_read_by_every_program(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    vectors = vectors_for(family, (2,))
    layer = LayerWeights(torch.randn(2, 320), torch.randn(320, 2))
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = AdapterFile(
        {path: layer}, AdapterMetadata(family=name), tokens={"<bolt>": vectors, "zwq": vectors}
    )
    tensors = load_file(write_adapter(tmp_path / "a.safetensors", adapter, "kohya"))
    for key, wanted in zip(COMFYUI_KEYS[kind_of(family)], vectors.values(), strict=True):
        assert torch.equal(in_comfyui(tensors, key), torch.cat([wanted, wanted]))
    for token in ("<bolt>", "zwq"):
        start = f"bundle_emb.{token}."
        own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        assert all(torch.equal(a, b) for a, b in zip(in_a1111(own), vectors.values(), strict=True))
    report = inspect_adapter(tmp_path / "a.safetensors")
    assert report.tokens == {"<bolt>": 2, "zwq": 2}
    # CLIP's tokenizer keeps ">," together, and letters apart from ",".
    (note,) = (note for note in report.notes if note.startswith("A1111 finds"))
    assert "write '<bolt> ,' for '<bolt>,'" in note


def test_a_file_of_another_trainer_is_called_by_its_name(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 8)}, tmp_path / "mine.safetensors")
    assert list(read_embedding(tmp_path / "mine.safetensors")) == ["mine"]


@pytest.mark.parametrize(
    "stem", ["my dog", "dog (1)", "a,b", "a:b", "[x]", "a\tb", "süß-2.0", "my  dog  "]
)
def test_a_word_s_file_has_a_name_that_a_prompt_can_hold(tmp_path: Path, stem: str) -> None:
    """ComfyUI takes a name up to the next space, and brackets, colons and commas as its syntax."""
    [file] = embedding_files(tmp_path, stem, ["<bolt>"]).values()
    assert file.name.endswith("_bolt.safetensors")
    assert not re.search(r"[\s()\[\]{}:,]", file.name)
    kept = re.sub(r"[^\w.-]", "", stem)
    assert re.sub("_", "", file.stem.removesuffix("_bolt")) == kept


# What splits a text before CLIP's tokens are looked up.
CLIP_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def comfyui_reads(text: str, name: str) -> bool:
    """Return whether ComfyUI (comfy/sd1_clip.py) finds an embedding of this name in a text.

    Brackets, and a weight in them, are taken off first; then words are what spaces separate.
    """
    text = re.sub(r"\((.*?)(:[\d.]+)?\)", r" \1 ", text.replace("\n", " ")).replace("(", " ")
    pieces = text.split(" ")
    starts = [piece.removeprefix("embedding:") for piece in pieces if "embedding:" in piece[:10]]
    return name in [start.strip(",") for start in starts]


def a1111_reads(text: str, name: str) -> bool:
    """Return whether A1111 and Forge find a name: as its tokens, among those of the text."""
    words, own = CLIP_PIECES.findall(text), CLIP_PIECES.findall(name)
    return any(words[i : i + len(own)] == own for i in range(len(words)))


@pytest.mark.parametrize("after", ["", *string.punctuation, *"a1 \n", ":1.2)"])
def test_each_program_is_told_what_may_follow_a_word(after: str, sd1_folder: Path) -> None:
    """By the program's own rule, restated; of Diffusers by its own tokenizer."""
    told, name = FACTS["trained_words"], "my_bolt"
    is_weight = after == ":1.2)"
    start = "(" if after.endswith(")") else ""
    is_read = comfyui_reads(f"a {start}embedding:{name}{after} x", name)
    assert is_read == (after in ("", *" ,()\n") or is_weight)
    assert "a space, comma, ) or :WEIGHT) after it" in told["comfyui"]
    dropped = told["comfyui"].partition("such as ")[2].partition(", ComfyUI drops")[0].split()
    assert dropped == [*".;:?'/"]
    assert after not in dropped or not is_read
    assert a1111_reads(f"a {name}{after} x", name) == (after != "a")
    assert "which no letter may touch" in told["a1111"]
    assert told["a1111"] == told["forge"]
    tokenizer = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    tokenizer.add_tokens("<bolt>")
    assert "<bolt>" in tokenizer.tokenize(f"a <bolt>{after}x")
    assert "any character may touch" in told["diffusers"]
    assert re.findall(r"<[a-zA-Z0-9., _-]+>", f"a <{name}>{after}x") == [f"<{name}>"]
    assert "any character may touch" in told["invokeai"]
