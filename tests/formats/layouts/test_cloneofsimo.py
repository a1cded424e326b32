"""Files of the first LoRA trainer: each numbered layer is put where that trainer had it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.cli.main import main
from dora_diffusion.export import convert_adapter, export_checkpoint, inspect_adapter
from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.load import load_adapted
from tests.formats.adapter.helpers import Held, load_pipeline
from tests.formats.layouts.early_trainer import TextEncoder, UNet2DConditionModel, inject, save

ATTENTION = ["GEGLU", "CrossAttention", "Attention"]


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (ATTENTION, (nn.Linear,)),
        (["CrossAttention"], (nn.Linear,)),
        (["ResnetBlock2D", *ATTENTION], (nn.Linear, nn.Conv2d)),
        (["ResnetBlock2D", *ATTENTION], (nn.Linear,)),
    ],
)
def test_each_layer_gets_its_own_pair(
    tmp_path: Path, is_early: bool, classes: list[str], kinds: tuple[type[nn.Module], ...]
) -> None:
    """The merged trees compute what the trees with the trained pairs in them compute."""
    torch.manual_seed(0)
    trees = {"unet": UNet2DConditionModel(is_early), "text_encoder": TextEncoder(2, 10)}
    used = {"unet": classes, "text_encoder": ["CLIPAttention"]}
    merged, trained = copy.deepcopy(trees), copy.deepcopy(trees)
    for component, tree in trained.items():
        inject(tree, used[component], kinds)
    file = save(tmp_path / "a.safetensors", {c: (trained[c], used[c]) for c in trees}, {})
    base = Held({f"{component}.{name}": tensor for component, tree in trees.items()
                 for name, tensor in tree.state_dict().items()})  # fmt: skip
    adapter = read_adapter(file, base)
    assert not adapter.notes
    assert len(adapter.layers) == len(load_file(file)) // 2
    for name, layer in adapter.layers.items():
        component, _, path = name.partition(".")
        weight = merged[component].get_submodule(path).weight
        weight.data = merge_tensor(weight.data, [(layer, Strengths())])
    x, time, text = torch.randn(2, 4, 6, 6), torch.randn(2, 6), torch.randn(2, 5, 10)
    with torch.no_grad():
        for component, inputs in {"unet": (x, time, text), "text_encoder": (text,)}.items():
            wanted = trained[component](*inputs)
            assert (wanted - trees[component](*inputs)).norm() > 0.05 * wanted.norm()
            torch.testing.assert_close(merged[component](*inputs), wanted, rtol=1e-4, atol=1e-5)


VECTORS = {"<s1>": torch.arange(32.0), "<s2>": torch.arange(64.0).reshape(2, 32) / 64}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Path:
    """An adapter for the tiny pipeline, in its Diffusers' order, with two trained tokens."""
    pipeline = load_pipeline(sd1_folder)
    classes = {"unet": ["Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
    for component, names in classes.items():
        inject(getattr(pipeline, component), names, (nn.Linear,))
    models = {name: (getattr(pipeline, name), names) for name, names in classes.items()}
    return save(tmp_path_factory.mktemp("early") / "lora.safetensors", models, VECTORS)


def test_what_is_said_of_it(
    file: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect_adapter(file, sd1_folder)
    assert (report.key_format, report.method) == ("cloneofsimo", "LoRA")
    assert report.fits == "yes, all 156 layers"
    assert report.layers == {"text_encoder": 12, "unet": 144}
    assert report.tokens == {"<s1>": 1, "<s2>": 2}
    assert report.metadata.trigger == "<s1> <s2>"
    assert {verdict.partition(":")[0] for verdict in report.tools.values()} == {"convert"}
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == {"<s1>": 1, "<s2>": 2}
    assert main(["inspect", str(file)]) == 0
    assert "<s1> (1 vector), <s2> (2 vectors)" in capsys.readouterr().out


def test_diffusers_reads_nothing_of_it(file: Path, sd1_folder: Path) -> None:
    """The reason to convert it."""
    pipeline = load_pipeline(sd1_folder)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    with pytest.raises(Exception, match=r"Invalid LoRA checkpoint|target modules|not found"):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    after = pipeline.unet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("target", ["diffusers", "peft", "kohya", "comfyui", "dense"])
def test_tokens_are_written_beside_a_conversion(
    tmp_path: Path, file: Path, sd1_folder: Path, target: str
) -> None:
    is_folder = target == "peft"
    output = tmp_path / "out" / ("mine" if is_folder else "mine.safetensors")
    report = convert_adapter(file, output, target, base=sd1_folder)
    folder = (output if is_folder else output.parent) / "embeddings"
    assert report.embeddings == {
        "<s1>": folder / "mine_s1.safetensors", "<s2>": folder / "mine_s2.safetensors",
    }  # fmt: skip
    for token, path in report.embeddings.items():
        (key, vectors), = load_file(path).items()  # fmt: skip
        assert key == "emb_params"
        assert torch.equal(vectors, VECTORS[token].view(-1, vectors.shape[1]))
    where, how, *a1111 = report.notes[-4 if target == "kohya" else -2 :]
    assert where.endswith("<s1> in embeddings/mine_s1.safetensors, <s2> in "
                          "embeddings/mine_s2.safetensors")  # fmt: skip
    # The file is as it is told.
    bundle = [] if is_folder else [k for k in load_file(output) if k.startswith("bundle_emb.")]
    said = "its trained words are in the file" if bundle else "its trained words are in separate"
    if target == "comfyui":  # where it is that of the file that matters
        said = "its trained words are also in separate files"
        assert bundle
    assert where.startswith(said)
    is_told = "in ComfyUI copy its file to models/embeddings and write embedding:NAME" in how
    assert is_told == (target != "diffusers")
    assert [note.split()[:3] for note in a1111] == [
        ["A1111", "finds", token] for token in VECTORS if target == "kohya"
    ]  # fmt: skip
    if a1111:
        assert a1111[0] in inspect_adapter(output).notes
    if target != "dense":
        again = read_adapter(output)
        assert again.layers.keys() == read_adapter(file).layers.keys()
        assert again.tokens.keys() == VECTORS.keys()
        for token, wanted in VECTORS.items():
            vectors = again.tokens[token]["text_encoder"]
            assert torch.equal(vectors.view_as(wanted), wanted)
        report.embeddings["<s2>"].unlink()
        again = read_adapter(output)
        if target in ("kohya", "comfyui"):  # which hold them
            assert again.tokens.keys() == VECTORS.keys()
        else:
            (note,) = (n for n in again.notes if "trained token" in n)
            assert note.startswith("its trained token's file embeddings/mine_s2.safetensors is not")
    if not is_folder:
        output.unlink()
        with pytest.raises(ValueError, match=r"mine_s1\.safetensors exists; choose another name"):
            convert_adapter(file, output, target, base=sd1_folder)
        assert not output.exists()


def test_diffusers_reads_the_tokens(tmp_path: Path, file: Path, sd1_folder: Path) -> None:
    pipeline = load_pipeline(sd1_folder)
    files = convert_adapter(file, tmp_path / "out", "diffusers").embeddings
    for token, path in files.items():
        pipeline.load_textual_inversion(path, token=token)
    table = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<s1>", "<s2>", "<s2>_1"])
    wanted = torch.cat([VECTORS["<s1>"][None], VECTORS["<s2>"]])
    assert torch.equal(table[ids].detach(), wanted)


@pytest.mark.parametrize("name", ["merged.safetensors", "merged"])
def test_tokens_are_written_beside_a_merged_model(
    tmp_path: Path, file: Path, sd1_folder: Path, name: str
) -> None:
    """Its vocabulary stays the base's, which every program knows."""
    output = tmp_path / "out" / name
    with pytest.warns(UserWarning, match="trained words are in separate files: <s1>"):
        export_checkpoint(sd1_folder, file, output)
    folder = (output if name == "merged" else output.parent) / "embeddings"
    assert sorted(path.name for path in folder.iterdir()) == [
        "lora_s1.safetensors", "lora_s2.safetensors",
    ]  # fmt: skip
    assert torch.equal(load_file(folder / "lora_s2.safetensors")["emb_params"], VECTORS["<s2>"])
    if name == "merged":
        with PipelineFolder.open(output) as merged, PipelineFolder.open(sd1_folder) as base:
            assert merged.specs.keys() == base.specs.keys()
            pair = load_file(file)
            key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
            wanted = base[key] + pair["unet:0:up"] @ pair["unet:0:down"]
            torch.testing.assert_close(merged[key], wanted, rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="exists; choose another name"):
            export_checkpoint(sd1_folder, file, output)
        output.unlink()
        (folder / "lora_s1.safetensors").write_bytes((folder / "lora_s2.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"lora_s1\.safetensors exists"):
            export_checkpoint(sd1_folder, file, output)


@pytest.mark.parametrize("is_converted", [False, True])
def test_generate_takes_the_tokens_up(
    tmp_path: Path, file: Path, sd1_folder: Path, is_converted: bool
) -> None:
    """The prompt's tokens are the trained vectors, and no other prompt changes."""
    if is_converted:
        file = convert_adapter(file, tmp_path / "a", "diffusers").path
    components, metadata = load_adapted(sd1_folder, file, device="cpu")
    plain = load_pipeline(sd1_folder)
    encoder, tokenizer = components.text_encoders[0], components.tokenizers[0]
    assert metadata.trigger == "<s1> <s2>"
    ids = tokenizer("a <s1> dog").input_ids
    before = plain.tokenizer("a dog").input_ids
    assert [*ids[:2], *ids[3:]] == before
    table = encoder.get_input_embeddings()
    assert torch.equal(table(torch.tensor(ids))[2], VECTORS["<s1>"])
    old = plain.text_encoder.get_input_embeddings().weight
    assert torch.equal(table.weight, old)


def test_a_lost_file_of_a_token_is_said(tmp_path: Path, file: Path, sd1_folder: Path) -> None:
    report = convert_adapter(file, tmp_path / "a", "diffusers")
    report.embeddings["<s1>"].unlink()
    with pytest.warns(UserWarning, match=r"a_s1\.safetensors is not next to it, so the token"):
        load_adapted(sd1_folder, report.path, device="cpu")
    # A name that leads elsewhere is none that convert writes.
    tensors = load_file(report.path)
    with safe_open(report.path, "pt") as opened:
        metadata = opened.metadata()
    metadata["dora_diffusion.embeddings"] = json.dumps(["../a_s2.safetensors", 3])
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    assert not read_adapter(tmp_path / "b.safetensors").tokens


def test_live_modules_alone_say_that_they_leave_tokens(file: Path, sd1_folder: Path) -> None:
    from dora_diffusion import load_adapter

    pipeline = load_pipeline(sd1_folder)
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    with pytest.warns(UserWarning, match="tokens were trained with it, <s1>, <s2>, which live"):
        load_adapter(modules, file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, m: t.pop("unet:3:up"), "unet:3 lacks its up factor"),
        (lambda t, m: t.update({"unet:143:down": t["unet:0:down"][0]}), r"factors of shapes \(32"),
        (lambda t, m: t.update({"unet:144:down": t["unet:0:down"], "unet:144:up": t["unet:0:up"]}),
         "its 145 unet layers cannot be matched to"),
        (lambda t, m: t.update({"other": torch.ones(3)}), "1 keys belong to no known module"),
        (lambda t, m: t.update({"<s1>": torch.full((32,), torch.nan)}), "<s1> is not a vector"),
        (lambda t, m: m.update({"unet": "GEGLU"}), "its metadata should list the classes of"),
        (lambda t, m: m.update({"unet": '["GEGLU", "Mystery"]'}), "has adapted Mystery"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(
    tmp_path: Path, file: Path, sd1_folder: Path, change: Any, reason: str
) -> None:
    with safe_open(file, "pt") as opened:
        tensors, metadata = load_file(file), opened.metadata()
    change(tensors, metadata)
    damaged = tmp_path / "a.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, damaged, metadata)
    with PipelineFolder.open(sd1_folder) as base, pytest.raises(AdapterFormatError, match=reason):
        read_adapter(damaged, base)


def test_tokens_of_another_width_are_refused(tmp_path: Path, file: Path, sd1_folder: Path) -> None:
    wide = tmp_path / "a.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if k.startswith("unet:")}
    save_file({**tensors, "<s1>": torch.ones(768)}, wide, {"<s1>": "<embed>"})
    reason = "768 numbers, but this text encoder reads 32"
    with PipelineFolder.open(sd1_folder) as base, pytest.raises(AdapterFormatError, match=reason):
        read_adapter(wide, base)
    assert report_on(wide).tokens == {"<s1>": 1}


def test_its_alpha_is_its_rank(file: Path) -> None:
    """No guess: it trained at scale 1."""
    adapter = read_adapter(file)
    assert {layer.scale for layer in adapter.layers.values()} == {1.0}
    assert not adapter.assumptions
    with pytest.raises(AdapterFormatError, match="the file determines its alpha"):
        read_adapter(file, alpha=2.0)
