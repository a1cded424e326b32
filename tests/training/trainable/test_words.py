"""New words beside an adapter: only their vectors move, and every program gets them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.adapters.state import load_adapter
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import convert_adapter, export_checkpoint, inspect_adapter
from dora_diffusion.export.derive import combine_adapters
from dora_diffusion.export.files import open_model
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.export.metadata import trained_trigger
from dora_diffusion.formats.adapter.embeddings import are_equal, read_tokens
from dora_diffusion.formats.adapter.file import (
    AdapterFormatError,
    read_adapter,
    write_adapter,
)
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.training.features.words import add_words
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.results.card import _words
from dora_diffusion.training.results.checkpoint import STATE_FILE
from dora_diffusion.training.results.write import result_metadata
from dora_diffusion.training.trainable.words import TrainedTokens
from tests.formats.layouts.helpers import load_pipeline
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    make_config,
    small_samples,
)

WORDS = {
    "instance_prompt": "a photo of a <s1> mug", "token": "<s1>", "train_text_encoder_ti": True,
    "embedding_lr": 1e-2, "targets": ["cross-attention"],
}  # fmt: skip
# With all that a step may be made of; and by itself.
RUN: dict[str, dict[str, object]] = {
    "sd1": {
        "checkpointing_steps": 2, "with_prior_preservation": True, "caption_dropout": 0.3,
        "gradient_accumulation_steps": 2, "train_text_encoder": True, "learning_rate": 1e-2,
    },
    "sdxl": {"max_train_steps": 2},
}  # fmt: skip
PROMPT = "a photo of a <s1> mug"


def caption(folder: Path, text: str = PROMPT, count: int = 5) -> Path:
    for photo in sorted(folder.glob("*.txt"))[:count]:
        photo.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos, whose captions have the word."""
    folder = tmp_path_factory.mktemp("words") / "photos"
    return caption(Path(shutil.copytree(small_samples() / "bolt_mug", folder)))


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, named: Path, sd1_folder: Path, sdxl_folder: Path
) -> Callable[[str], tuple[Path, Path]]:
    """The base and a run of four steps with a word of two vectors, by family."""
    bases, done = {"sd1": sd1_folder, "sdxl": sdxl_folder}, {}

    def run(family: str) -> tuple[Path, Path]:
        if family not in done:
            output = tmp_path_factory.mktemp("words") / family
            train(make_config(
                bases[family], named, output, **WORDS, initializer_concept=["dog"], **RUN[family]
            ))  # fmt: skip
            done[family] = output
        return bases[family], done[family]

    return run


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_makes_our_image(runs: Callable[[str], tuple[Path, Path]], family: str) -> None:
    base, run = runs(family)
    ours = load_adapted(base, run, device="cpu")[0].pipeline()
    theirs = load_pipeline(base)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    follow_card(run / "README.md", theirs)
    np.testing.assert_allclose(image(ours, PROMPT), image(theirs, PROMPT), rtol=0, atol=1e-5)
    assert np.abs(image(ours, PROMPT) - image(ours, "a photo of a mug")).max() > 0.01


def follow_card(card: Path, pipeline: object) -> None:
    """Load words into a pipeline by the last lines of Python in a card."""
    code = card.read_text(encoding="utf-8").split("```python\n")[-1].split("```")[0]
    here = card.parent.as_posix()
    exec(code.replace(f', "{card.parent.name}/', f', "{here}/'), {"pipeline": pipeline})


def image(pipeline: object, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt, num_inference_steps=2, width=32, height=32, generator=generator, output_type="np"
    ).images  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
@pytest.mark.filterwarnings("ignore:merged")
def test_the_card_of_a_merged_folder_has_its_words(
    runs: Callable[[str], tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    """And that of one that is merged or copied from it, with all that was trained before."""
    base, run = runs(family)
    merged = export_checkpoint(base, run, tmp_path / "merged")
    second = tmp_path / "second"
    adapter = read_adapter(run)
    vectors = {name: rows + 1 for name, rows in adapter.tokens["<s1>"].items()}
    metadata = replace(adapter.metadata, trigger="<s2> cup")
    write_adapter(second, replace(adapter, metadata=metadata, tokens={"<s2>": vectors}))
    again = export_checkpoint(merged, second, tmp_path / "again")
    one = export_checkpoint(merged, second, tmp_path / "one" / "file.safetensors")
    parts = export_checkpoint(BaseModel(one, model_config=base), (), tmp_path / "parts")
    both = "a <s2> cup and a <s1> mug"
    for folder, prompt in ((merged, PROMPT), (again, both), (parts, both)):
        theirs = load_pipeline(folder)
        theirs.set_progress_bar_config(disable=True)
        follow_card(folder / "README.md", theirs)
        ours = load_components(folder).pipeline()
        np.testing.assert_allclose(image(ours, prompt), image(theirs, prompt), rtol=0, atol=1e-5)
    for model in (again, one, parts):
        with open_model(model) as stored:
            assert trained_trigger(stored.metadata) == "<s1> mug, <s2> cup"
    with open_model(one) as stored:
        assert stored.metadata["modelspec.trigger_phrase"] == "<s1> mug, <s2> cup"
    card = (again / "README.md").read_text(encoding="utf-8")
    assert "Write **`<s1> mug`** and **`<s2> cup`** in a prompt" in card
    for name in ("merged_s1", "s2"):
        assert f"`embedding:{name}`" in card
        assert f"`<{name}>`" in card
        assert (again / "embeddings" / f"{name}.safetensors").is_file()


def test_a_word_of_two_meanings_is_said(
    runs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, run = runs("sd1")
    adapter = read_adapter(run)
    other = {name: rows + 1 for name, rows in adapter.tokens["<s1>"].items()}
    file = write_adapter(tmp_path / "other.safetensors", replace(adapter, tokens={"<s1>": other}))
    for name in ("merged", "merged.safetensors"):
        with pytest.warns(UserWarning, match=r"<s1> has different vectors in other_s1\.safetens"):
            merged = export_checkpoint(base, [(run, 0.5), (file, 0.5)], tmp_path / name)
        assert are_equal(read_tokens(merged)["<s1>"], adapter.tokens["<s1>"])


def test_only_the_vectors_of_the_word_move(sdxl_folder: Path, named: Path, tmp_path: Path) -> None:
    config = make_config(
        sdxl_folder, named, tmp_path, **WORDS, max_train_steps=3, with_prior_preservation=True
    )
    session = assemble(plan_run(config), make_accelerator(config))
    before = load_components(sdxl_folder)
    words = session.weights.words
    seen = [{name: rows.clone() for name, rows in words.parameters().items()}]
    encoded = []
    condition = session.step.encode
    encode = condition._encode
    condition._encode = lambda captions: encoded.append(list(captions)) or encode(captions)
    for step in (1, 2, 3):
        session.step(step)
        seen.append({name: rows.clone() for name, rows in words.parameters().items()})
    for name in words.parameters():
        first, one, two, three = (rows[name] for rows in seen)
        assert (first - one).abs().min() > 0
        assert (one - two).abs().min() > 0
        assert (two - three).abs().min() > 0
    for old, new in zip(before.text_encoders, session.components.text_encoders, strict=True):
        now = new.state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in old.state_dict().items())
        assert not any(p.requires_grad for n, p in new.named_parameters() if "rows" not in n)
    sizes = {group["name"]: sum(p.numel() for p in group["params"])
             for group in session.step.optimizer.param_groups}  # fmt: skip
    assert (sizes["text_encoder/words"], sizes["text_encoder_2/words"]) == (64, 128)
    # The class caption is encoded once, and captions with the word in every step.
    assert encoded.count(["a photo of a mug"]) == 1
    assert encoded.count([PROMPT]) == 3


def test_a_batch_without_the_word_gives_it_a_gradient_of_zero(
    sd1_folder: Path, named: Path, tmp_path: Path
) -> None:
    """Not none, which processes that share gradients could not average."""
    config = make_config(sd1_folder, named, tmp_path, **WORDS)
    session = assemble(plan_run(config), make_accelerator(config))
    step = session.step
    step.batches = repeat(replace(next(step.batches), captions=("a mug",)))  # type: ignore[assignment]
    (rows,) = session.weights.words.parameters().values()
    gradients: list[Any] = []
    step.parameters.take_gradients = lambda: gradients.append(rows.grad)  # type: ignore[method-assign]
    step(1)
    assert gradients[0] is not None
    assert not gradients[0].any()


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    runs: Callable[[str], tuple[Path, Path]], named: Path, tmp_path: Path
) -> None:
    base, whole = runs("sd1")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    config = make_config(base, named, tmp_path, **WORDS, initializer_concept=["dog"], **RUN["sd1"])
    train(replace(config, resume_from_checkpoint="checkpoint-2"))
    states = [
        torch.load(folder / STATE_FILE, weights_only=True)["parameters"]
        for folder in (whole / "checkpoint-2", whole / "checkpoint-4", tmp_path / "checkpoint-4")
    ]
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in states[1].items())
    assert not torch.equal(*(state["text_encoder.words"] for state in states[:2]))
    assert_same_adapter(whole, tmp_path)


def test_full_fine_tuning_writes_a_model_that_knows_the_word(
    sd1_folder: Path, named: Path, tmp_path: Path
) -> None:
    config = make_config(
        sd1_folder, named, tmp_path / "out", **WORDS, method="full", full_weights="targets",
        with_prior_preservation=True,
    )  # fmt: skip
    session = assemble(plan_run(config), make_accelerator(config))
    live, start = session.components, encode_prompts(session.components, [PROMPT])
    session.step(1)
    trained = encode_prompts(live, [PROMPT])
    with session.weights.base_weights():
        before = encode_prompts(live, [PROMPT])
    assert torch.equal(before.encoder_hidden_states, start.encoder_hidden_states)
    assert not torch.equal(trained.encoder_hidden_states, start.encoder_hidden_states)
    written = session.weights.writer()(tmp_path / "model", result_metadata(session, 1))
    session.weights.check(written)
    model = load_components(written)
    again = encode_prompts(model, [PROMPT])
    assert torch.equal(again.encoder_hidden_states, trained.encoder_hidden_states)
    card = _words(replace(config, single_file=True), written)
    assert f'"{tmp_path.name}/model/embeddings/s1.safetensors"' in card
    assert "`model.safetensors` has the same files in `embeddings` next to it" in card
    follow_card(written / "README.md", theirs := load_pipeline(written))
    assert torch.equal(
        theirs.encode_prompt(PROMPT, "cpu", 1, False)[0], trained.encoder_hidden_states
    )
    one = session.weights.writer()(
        tmp_path / "one" / "model.safetensors", result_metadata(session, 1)
    )
    again = encode_prompts(load_components(BaseModel(one, model_config=sd1_folder)), [PROMPT])
    torch.testing.assert_close(
        again.encoder_hidden_states, trained.encoder_hidden_states, rtol=1e-4, atol=1e-5
    )
    session.weights.reload(written)
    with torch.no_grad():
        live.text_encoders[0].get_input_embeddings().rows[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"text_encoder\.words contains values that are not finite"
    ):
        session.weights.check(written)


def test_other_optimizers_and_precisions_train_it(
    sd1_folder: Path, named: Path, tmp_path: Path
) -> None:
    def rows_of(**settings: object) -> torch.Tensor:
        config = make_config(sd1_folder, named, tmp_path, **WORDS, **settings)
        session = assemble(plan_run(config), make_accelerator(config))
        for step in (1, 2):
            session.step(step)
        (rows,) = session.weights.words.parameters().values()
        start = session.weights.words.start["text_encoder"]
        assert (rows - start).abs().min() > 0
        return rows.detach()

    plain = rows_of()
    torch.testing.assert_close(rows_of(gradient_checkpointing=True), plain, rtol=1e-3, atol=1e-5)
    assert 0 < (rows_of(mixed_precision="bf16") - plain).abs().max() < 0.05
    rows_of(optimizer="adafactor", norm_axis="input", method="lora")
    rows_of(parametrization="vera")


def test_where_words_start(sdxl_folder: Path, named: Path, tmp_path: Path) -> None:
    """At their concepts' own vectors, at the mean of those, or as noisy as the table."""
    settings = {
        **WORDS, "instance_prompt": "a <s1> mug in <s2> and <s3>", "resolution": 32,
        "new_words": ["<s1>", "<s2>", "<s3>"],
        "initializer_concept": ["a dog", "dog", "a photo of"],
    }  # fmt: skip
    folder = caption(Path(shutil.copytree(named, tmp_path / "photos")), "a <s1> mug, <s2>, <s3>")
    words = add_to(sdxl_folder, folder, tmp_path, settings)
    for component, encoder, tokenizer in zip(
        ("text_encoder", "text_encoder_2"), *parts(sdxl_folder), strict=True
    ):
        table = encoder.get_input_embeddings().weight
        vector = {word: table[tokenizer(word).input_ids[1]] for word in ("a", "dog", "photo", "of")}
        mean = (vector["a"] + vector["photo"] + vector["of"]) / 3
        wanted = [vector["a"], vector["dog"], vector["dog"], vector["dog"], mean, mean]
        torch.testing.assert_close(words.start[component], torch.stack(wanted))
    random = add_to(sdxl_folder, folder, tmp_path, {
        **settings, "initializer_concept": [], "num_new_tokens_per_abstraction": 500,
    })  # fmt: skip
    for component, encoder in zip(random.start, parts(sdxl_folder)[0], strict=True):
        std = encoder.get_input_embeddings().weight.std()
        assert abs(random.start[component].std() / std - 1) < 0.03


def add_to(base: Path, photos: Path, output: Path, settings: dict[str, object]) -> TrainedTokens:
    return add_words(load_components(base), make_config(base, photos, output, **settings))


def parts(folder: Path) -> tuple[tuple[object, ...], tuple[object, ...]]:
    components = load_components(folder)
    return components.text_encoders, components.tokenizers


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_file_keeps_the_word(
    runs: Callable[[str], tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    base, run = runs(family)
    tokens = read_adapter(run).tokens
    names = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    assert sorted(tokens["<s1>"]) == names
    report = inspect_adapter(run)
    assert (report.metadata.trigger, report.tokens) == ("<s1> mug", {"<s1>": 2})
    assert "`s1`" in (run / "README.md").read_text(encoding="utf-8")
    kohya = tmp_path / "kohya" / "mine.safetensors"
    convert_adapter(run, kohya, "kohya")
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    stored = load_file(kohya)
    for name in names:  # As OneTrainer, A1111 and ComfyUI read it.
        assert torch.equal(stored[f"bundle_emb.<s1>.{keys[name]}"], tokens["<s1>"][name])
    assert inspect_adapter(kohya).tools["diffusers"].startswith("convert: it refuses tokens in")
    with pytest.raises(Exception, match="Invalid LoRA checkpoint"):
        load_pipeline(base).load_lora_weights(kohya.parent, weight_name=kohya.name)
    shutil.rmtree(kohya.parent / "embeddings")  # The file alone is enough.
    convert_adapter(kohya, tmp_path / "back", "diffusers")
    combine_adapters(base, [(run, 0.5), (kohya, 0.5)], tmp_path / "sum", FitSettings(rank=2))
    for folder in ("back", "sum"):
        again = read_adapter(tmp_path / folder)
        assert again.tokens.keys() == {"<s1>"}
        assert are_equal(again.tokens["<s1>"], tokens["<s1>"])
        assert again.metadata.trigger == "<s1> mug"
    stored["bundle_emb.<s1>.clip_l_out"] = stored["bundle_emb.<s1>.clip_l"].clone()
    save_file(stored, tmp_path / "out.safetensors")
    with pytest.raises(AdapterFormatError, match="embeddings bundled with the adapter"):
        read_adapter(tmp_path / "out.safetensors")


def test_live_modules_alone_say_that_they_leave_it(
    runs: Callable[[str], tuple[Path, Path]],
) -> None:
    base, run = runs("sd1")
    with pytest.warns(UserWarning, match="tokens were trained with it, <s1>, which live"):
        load_adapter(load_components(base).adaptable(), run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": "dog", "instance_prompt": "a dog mug"}, "'dog' is already a token of"),
        ({"new_words": ["<s1>", "<s2>"]}, "new word '<s2>' is in no caption"),
        ({"train_text_encoder": True, "text_encoder_targets": ["*token_embedding", "*q_proj"]},
         "cannot be added to a token embedding with an adapter"),
    ],
)  # fmt: skip
def test_what_the_model_or_the_captions_refuse(
    sd1_folder: Path, named: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    settings = {**WORDS, **changes}
    folder = caption(Path(shutil.copytree(named, tmp_path / "photos")), settings["instance_prompt"])
    with pytest.raises(ValueError, match=reason):
        train(make_config(sd1_folder, folder, tmp_path / "out", **settings))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_concept_that_is_spelled_is_said(sd1_folder: Path, named: Path, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="'qzx' is not a word of the model: it is split into 3 tok"
    ):
        add_to(sd1_folder, named, tmp_path, {**WORDS, "initializer_concept": ["qzx"]})


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        ("token", {"token": ""}, "token is ''"),
        ("new_words", {"new_words": ["<a>", "<a>"]}, "contains the new word"),
        ("new_words", {"new_words": ["<a>", "<a>_1"]}, "contains the new word"),
        ("new_words", {"token": "TOK"}, "lower case"),
        ("new_words", {"new_words": ["a.b"]}, "without spaces, dots and slashes"),
        ("initializer_concept", {"initializer_concept": ["dog", "cat"]}, "2 for 1 new words"),
        ("initializer_concept", {"initializer_concept": [" "]}, "without empty ones"),
        ("initializer_concept", {"token": "<a>", "initializer_concept": ["a <a>"]}, "'<a>', which"),
        ("initializer_concept", {"token": "sks", "initializer_concept": ["sks"]}, "'<sks>'"),
        ("text_encoder_targets",
         {"train_text_encoder": True, "text_encoder_targets": ["token-embedding"]},
         "adapts the table"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(setting: str, values: dict[str, object], words: str) -> None:
    with refused(setting, words):
        TrainConfig(**{"train_text_encoder_ti": True, "token": "<a>", **values})


def test_a_run_starts_from_the_words_of_an_adapter(
    runs: Callable[[str], tuple[Path, Path]], named: Path, tmp_path: Path
) -> None:
    base, run = runs("sdxl")
    config = make_config(base, named, tmp_path, **WORDS, init_adapter=str(run))
    session = assemble(plan_run(config), make_accelerator(config))
    stored = read_adapter(run).tokens["<s1>"]
    assert are_equal(session.weights.words.tokens()["<s1>"], stored)
    with session.weights.base_weights():
        assert are_equal(session.weights.words.tokens()["<s1>"], stored)
    one = replace(config, num_new_tokens_per_abstraction=1)
    with refused("num_new_tokens_per_abstraction", "2 vectors"):
        assemble(plan_run(one), make_accelerator(one))
    none = replace(config, train_text_encoder_ti=False)
    with refused("init_adapter", "<s1>", "add --train_text_encoder_ti --new_words <s1>"):
        assemble(plan_run(none), make_accelerator(none))


def test_a_merged_file_knows_the_words_beside_it(
    runs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, run = runs("sd1")
    with pytest.warns(UserWarning, match="<s1>"):
        merged = export_checkpoint(base, run, tmp_path / "merged.safetensors")
    states = [
        encode_prompts(model, [PROMPT]).encoder_hidden_states
        for model in (
            load_components(BaseModel(merged, model_config=base)),
            load_adapted(base, run, device="cpu")[0],
        )
    ]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    (file,) = (tmp_path / "embeddings").iterdir()
    # What is merged or copied from it, into the same folder or another one, knows them too.
    for place in ("again.safetensors", "other/again.safetensors", "other/third.safetensors"):
        with pytest.warns(UserWarning, match="<s1>"):
            again = export_checkpoint(merged, (), tmp_path / place)
        state = encode_prompts(
            load_components(BaseModel(again, model_config=base)), [PROMPT]
        ).encoder_hidden_states
        torch.testing.assert_close(state, states[0])
    file.unlink()
    with pytest.warns(UserWarning, match=rf"{file.name} is not next to it"):
        load_components(BaseModel(merged, model_config=base))
