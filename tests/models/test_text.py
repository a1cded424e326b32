"""Conditioning against diffusers' own encode_prompt, bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.data.crops import CropRecord
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.load import Components, load_components
from dora_diffusion.models.text import (
    encode_negative,
    encode_prompts,
    encode_unconditional,
    time_ids,
    truncated_text,
)

PROMPTS = ["a photo of sks dog", "", "A red  toy, on the backpack!", "zebra " * 11]
LONG = "a photo of sks dog on the red backpack " + "a cat in the photo " * 16


@pytest.fixture(params=["sd1_folder", "sd2_folder", "sdxl_folder"])
def components(request: pytest.FixtureRequest) -> Components:
    return load_components(request.getfixturevalue(request.param))


def reference(components: Components, prompts: list[str], guided: bool = False) -> tuple:
    """Diffusers' embeddings: positive, negative, and SDXL's pooled pair (else Nones)."""
    encoded = components.pipeline().encode_prompt(
        prompts,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )
    return encoded if len(encoded) == 4 else (*encoded, None, None)


def assert_same(conditioning: Conditioning, hidden: torch.Tensor, pooled: object) -> None:
    assert torch.equal(conditioning.encoder_hidden_states, hidden)
    if pooled is None:
        assert conditioning.pooled is None
    else:
        assert torch.equal(conditioning.pooled, pooled)


def test_prompts_encode_as_in_the_pipeline(components: Components) -> None:
    hidden, _, pooled, _ = reference(components, PROMPTS)
    encoded = encode_prompts(components, PROMPTS)
    assert_same(encoded, hidden, pooled)
    assert encoded.encoder_hidden_states.shape[-1] == components.denoiser.config.cross_attention_dim
    assert_same(encode_prompts(components, [""]), *reference(components, [""])[0:4:2])


def test_padding_is_masked_where_the_encoder_asks_for_it(sd1_folder: Path) -> None:
    components = load_components(sd1_folder)
    unmasked = encode_prompts(components, PROMPTS)
    components.text_encoders[0].config.use_attention_mask = True
    hidden, _, pooled, _ = reference(components, PROMPTS)
    masked = encode_prompts(components, PROMPTS)
    assert_same(masked, hidden, pooled)
    assert not torch.equal(masked.encoder_hidden_states, unmasked.encoder_hidden_states)


def test_unconditional_is_what_guidance_uses(components: Components) -> None:
    _, negative, _, pooled = reference(components, ["a dog", "a cat"], guided=True)
    assert_same(encode_unconditional(components, 2), negative, pooled)
    zeros = bool((negative == 0).all())
    assert zeros == components.family.has_pooled == components.zeros_for_empty_prompt


def test_long_prompts_are_cut_as_in_the_pipeline_and_say_what(components: Components) -> None:
    with pytest.warns(UserWarning, match="longer than the model's 77 tokens") as caught:
        encoded = encode_prompts(components, [LONG, LONG, "a dog"])
    (warning,) = (each for each in caught if each.category is UserWarning)
    assert warning.filename == __file__
    hidden, _, pooled, _ = reference(components, [LONG, LONG, "a dog"])
    assert_same(encoded, hidden, pooled)
    cut = truncated_text(components, LONG)
    assert repr(cut) in str(warning.message)
    assert LONG.strip().endswith(cut)
    assert len(cut.split()) == len(LONG.split()) - 75


def test_gradients_reach_every_encoder(components: Components) -> None:
    for encoder in components.text_encoders:
        encoder.requires_grad_(True)
    encoded = encode_prompts(components, ["a photo of sks dog"])
    (encoded.encoder_hidden_states.square().sum()).backward()
    for encoder in components.text_encoders:
        gradient = encoder.get_input_embeddings().weight.grad
        assert gradient.abs().sum() > 0
    assert not encoded.detach().encoder_hidden_states.requires_grad


def test_multi_vector_tokens_expand_as_in_the_pipeline(components: Components) -> None:
    for tokenizer, encoder in zip(components.tokenizers, components.text_encoders, strict=True):
        tokenizer.add_tokens(["<thing>", "<thing>_1", "<thing>_2"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder.resize_token_embeddings(len(tokenizer))
    prompts = ["a photo of <thing>", "a dog"]
    hidden, _, pooled, _ = reference(components, prompts)
    assert_same(encode_prompts(components, prompts), hidden, pooled)
    tokenizer = components.tokenizers[0]
    first = tokenizer.convert_tokens_to_ids("<thing>")
    unexpanded = tokenizer("a photo of <thing>").input_ids
    assert unexpanded.count(first) == 1
    assert first + 1 not in unexpanded


def test_conditioning_rows_can_be_chosen_and_stacked() -> None:
    whole = Conditioning(torch.randn(3, 4, 5), torch.randn(3, 2))
    assert len(whole) == 3
    assert len(whole[1]) == 1
    assert_same(whole[[2, 0]], whole.encoder_hidden_states[[2, 0]], whole.pooled[[2, 0]])
    assert_same(Conditioning.cat([whole[0], whole[1:]]), whole.encoder_hidden_states, whole.pooled)
    assert whole.to(torch.float64).pooled.dtype == torch.float64
    bare = Conditioning(torch.randn(1, 4, 5))
    assert bare[0].pooled is None
    with pytest.raises(ValueError, match="some has none"):
        Conditioning.cat([whole, bare])


def test_a_single_string_is_refused(components: Components) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        encode_prompts(components, "a dog")


def test_time_ids_are_the_pipelines(sdxl_folder: Path) -> None:
    components = load_components(sdxl_folder)
    expected = components.pipeline()._get_add_time_ids(
        (600, 800), (12, 34), (512, 512), torch.float32, text_encoder_projection_dim=48
    )
    ids = time_ids(components.family, [CropRecord((600, 800), (12, 34), (512, 512))])
    assert torch.equal(ids, expected)


def test_added_conditions_run_the_unet(components: Components) -> None:
    encoded = encode_prompts(components, ["a dog", "a cat"])
    ids = time_ids(components.family, [CropRecord((64, 64), (0, 0), (64, 64))] * 2)
    added = encoded.added_cond_kwargs(ids)
    assert (added is None) == (not components.family.has_time_ids)
    with torch.no_grad():
        prediction = components.denoiser(
            torch.randn(2, 4, 8, 8),
            torch.tensor([3, 7]),
            encoded.encoder_hidden_states,
            added_cond_kwargs=added,
        ).sample
    assert torch.isfinite(prediction).all()


def by_hand(components: Components, prompt: str, clip_skip: int = 0) -> Conditioning:
    """Each 75 tokens between a start and an end token, by transformers alone, side by side."""
    states, pooled = [], None
    for part, tokenizer in enumerate(components.tokenizers):
        encoder, rows = components.text_encoders[part], []
        ids = tokenizer(prompt).input_ids[1:-1]
        for first in range(0, max(len(ids), 1), 75):
            row = [tokenizer.bos_token_id, *ids[first : first + 75], tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (77 - len(row))
            with torch.no_grad():
                output = encoder(torch.tensor([row]), output_hidden_states=True)
            if not components.family.has_pooled:
                last = output.hidden_states[-1 - clip_skip]
                rows.append(getattr(encoder, "text_model", encoder).final_layer_norm(last))
                continue
            rows.append(output.hidden_states[-2 - clip_skip])
            if part and first == 0:
                pooled = output.text_embeds
        states.append(torch.cat(rows, dim=1))
    return Conditioning(torch.cat(states, dim=-1), pooled)


def test_long_prompts_are_read_in_chunks(components: Components) -> None:
    """150 and 225 tokens, the rest cut and said; no limit; 75 or fewer to the last bit."""
    long = LONG + "a cat in the photo " * 30  # 239 tokens, a word each.
    words = long.split()
    short = encode_prompts(components, PROMPTS)
    for limit, kept in ((150, 150), (225, 225), (0, len(words))):
        reading = components.reading(None, limit)
        assert_same(encode_prompts(reading, PROMPTS), short.encoder_hidden_states, short.pooled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            encoded = encode_prompts(reading, [long])
        cut = truncated_text(reading, long)
        assert cut.split() == words[kept:]
        assert [repr(cut)[:20] in str(each.message) for each in caught] == [True] * bool(limit)
        expected = by_hand(components, " ".join(words[:kept]))
        assert encoded.encoder_hidden_states.shape[1] == 77 * -(-kept // 75)
        for name in ("encoder_hidden_states", "pooled"):
            tensor, wanted = getattr(encoded, name), getattr(expected, name)
            assert (tensor is None) == (wanted is None)
            if tensor is not None:
                torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_row_of_a_batch_does_not_depend_on_the_lengths_beside_it(components: Components) -> None:
    reading = components.reading(None, 0)
    prompts = ["a dog", LONG, "a cat " * 80]
    batch = encode_prompts(reading, prompts)
    assert batch.encoder_hidden_states.shape[1] == 6 * 77, "of 1, 2 and 3 chunks"
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    ids = time_ids(components.family, [CropRecord((64, 64), (0, 0), (64, 64))])

    def predict(rows: slice, encoded: Conditioning) -> torch.Tensor:
        own = None if ids is None else ids.expand(len(encoded), -1)
        added = encoded.added_cond_kwargs(own)
        states = encoded.encoder_hidden_states
        unet = components.denoiser
        return unet(latents[rows], torch.tensor(7), states, added_cond_kwargs=added).sample

    together = predict(slice(3), batch)
    for k, prompt in enumerate(prompts):
        alone = predict(slice(k, k + 1), encode_prompts(reading, [prompt]))
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - predict(slice(1), batch[1])).abs().max() > 1e-4


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_is_that_of_diffusers(
    components: Components, clip_skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_skip -= components.family.skipped_layers * (clip_skip - 1)  # The encoders have 3 layers.
    kind = type(components.text_encoders[0])
    if not hasattr(components.text_encoders[0], "text_model"):  # As the pipelines look for it.
        monkeypatch.setattr(kind, "text_model", property(lambda encoder: encoder), raising=False)
    hidden, negative, pooled, *_ = (
        *components.pipeline().encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
            clip_skip=clip_skip, negative_prompt=["a cat"] * len(PROMPTS),
        ),
        None,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        skipping = components.reading(clip_skip, None)
    said = [f"is Clip skip {clip_skip + 2} there" in str(each.message) for each in caught]
    assert said == [True] * components.family.skipped_layers
    encodings = encode_prompts(skipping, PROMPTS), encode_negative(skipping, ["a cat"])
    for ours, theirs in zip(encodings, (hidden, negative[:1]), strict=True):
        torch.testing.assert_close(ours.encoder_hidden_states, theirs, atol=1e-5, rtol=1e-5)
    if pooled is not None:
        torch.testing.assert_close(encodings[0].pooled, pooled, atol=1e-5, rtol=1e-5)
    expected = by_hand(components, PROMPTS[0], clip_skip).encoder_hidden_states
    torch.testing.assert_close(
        encodings[0].encoder_hidden_states[:1], expected, atol=1e-5, rtol=1e-5
    )
    plain = encode_prompts(components, PROMPTS).encoder_hidden_states
    assert (hidden - plain).abs().max() > 0.01


def test_what_cannot_be_read_so_is_refused(components: Components) -> None:
    layers = components.text_encoders[0].config.num_hidden_layers - components.family.skipped_layers
    with pytest.raises(ValueError, match=f"clip_skip is {layers}, .* 0 to {layers - 1}"):
        replace(components, clip_skip=layers)
    with pytest.raises(ValueError, match="max_token_length is 100; it must be a multiple of 75"):
        components.reading(None, 100)
