"""The transformer of tiny-flow, its language model and its optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from torch import nn

import lab.pretrain
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.toy.instrument import ATTRIBUTES
from lab.pretrain.flow import GRID, TextToImageFlow, _patches, map_loss
from lab.pretrain.instrument import NO_NAME
from lab.pretrain.language import Reader, build_language_tokenizer, read
from lab.pretrain.muon import Muon, orthogonalized

TRAINED = Path(lab.pretrain.__file__).parent / "tiny-flow"
CAPTIONS = ["a red ball with dots on a beach", "a photo of a sks mug"]


def test_the_fused_prediction_is_that_of_diffusers_class() -> None:
    components = load_components(TRAINED)
    tokenizer = components.tokenizers[0]
    ids = read(tokenizer, CAPTIONS).input_ids
    reader = Reader(tokenizer, ids)
    reader.text_encoder = components.text_encoders[0]
    model = TextToImageFlow(reader, tokenizer)
    model.transformer = components.denoiser
    latents, shares = torch.randn(2, 8, 16, 16), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        states, _ = reader.states(ids)
        found, middle = model(_patches(latents), shares, states, ids != reader.pad)
        lengths = (ids != reader.pad).sum(1).tolist()
        prompts = [row[:length] for row, length in zip(states, lengths, strict=True)]
        (wanted,) = components.denoiser(
            list(latents.unsqueeze(2)), shares, prompts, return_dict=False
        )
    assert middle.shape == (2, GRID * GRID, components.denoiser.dim)
    torch.testing.assert_close(found, _patches(torch.stack(wanted).squeeze(2)), rtol=0, atol=1e-4)


def test_captions_are_read_as_in_the_package() -> None:
    components = load_components(TRAINED)
    encoded = encode_prompts(components, CAPTIONS)
    ids = read(components.tokenizers[0], CAPTIONS).input_ids
    reader = Reader(components.tokenizers[0], ids)
    reader.text_encoder = components.text_encoders[0]
    with torch.no_grad():
        states, _ = reader.states(ids)
    for number, own in enumerate(encoded.by_prompt()):
        torch.testing.assert_close(own, states[number, : len(own)], rtol=0, atol=1e-5)


def test_the_trained_folder_is_diffusers_own() -> None:
    pipeline = ZImagePipeline.from_pretrained(TRAINED)
    assert sum(p.numel() for p in pipeline.transformer.parameters()) == 2_707_680
    size = sum(file.stat().st_size for file in TRAINED.rglob("*") if file.is_file())
    assert size < 14e6


def test_maps_ask_the_object_and_the_background_for_what_they_are() -> None:
    """Heads that know all of an object's token and of a background's cost nothing."""
    labels = torch.tensor([[3, NO_NAME, 1, 2]])
    tokens, heads = torch.eye(2)[None], nn.ModuleList()
    for (name, values), label in zip(ATTRIBUTES.items(), labels[0].tolist(), strict=True):
        shown = (len(values), label) if name == "background" else (label, len(values))
        head = nn.Linear(2, 1 + len(values), bias=False)
        with torch.no_grad():
            head.weight.zero_()
            for token, answer in enumerate(shown):
                if answer != NO_NAME:
                    head.weight[answer, token] = 50
        heads.append(head)
    assert map_loss(heads, tokens, torch.tensor([[255, 0]]), labels).item() < 1e-6
    assert float(map_loss(heads, tokens, torch.tensor([[0, 255]]), labels)) > 100


def test_a_tokenizer_has_a_token_for_each_listed_word(tmp_path: Path) -> None:
    tokenizer = build_language_tokenizer(tmp_path)
    text = "a photo of a sks mug"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" sks").input_ids) == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    singular = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert singular.min() > 0.3
    assert singular.max() < 1.4


def test_muon_moves_matrices_by_the_rate_and_others_as_adamw() -> None:
    matrix, other = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
    twin = nn.Parameter(other.detach().clone())
    before = matrix.detach().clone()
    optimizer = Muon([matrix], [other], 1e-2, 0.0)
    adamw = torch.optim.AdamW([twin], 1e-2, (0.9, 0.99), weight_decay=0.0)
    gradient = torch.randn(16, 16)
    for parameter in (matrix, other, twin):
        parameter.grad = gradient.clone()
    optimizer.step()
    adamw.step()
    torch.testing.assert_close(other, twin)
    change = (matrix - before).square().mean().sqrt()
    assert float(change) == pytest.approx(1e-2 * Muon.FACTOR, rel=0.25)
