"""Files of other programs beside an adapter: read as Diffusers reads them, or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.cli.main import main
from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.sampling.load import load_adapted
from tests.formats.adapter.helpers import MakeAdapter

LORA = "pytorch_lora_weights.safetensors"
KEYS = {"sd1": ["clip_l"], "sdxl": ["clip_l", "clip_g"]}


@pytest.fixture(scope="module")
def bases(sd1_folder: Path, sdxl_folder: Path) -> dict[str, Path]:
    return {"sd1": sd1_folder, "sdxl": sdxl_folder}


@pytest.fixture
def lora(
    tmp_path: Path, bases: dict[str, Path], random_adapter: MakeAdapter
) -> Callable[..., Path]:
    """Writes a LoRA as Diffusers' scripts do, without a word of this program."""

    def write(name: str = LORA, family: str = "sd1") -> Path:
        layers = random_adapter(bases[family], axis=None, components=("unet",), every=40)
        path = write_adapter(tmp_path / "y2k" / name, AdapterFile(layers))
        save_file(load_file(path), path)
        return path

    return write


def write_tokens(file: Path, keys: list[str], width: int = 32) -> dict[str, Tensor]:
    file.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {key: torch.randn(2, width * 2 ** (key == "clip_g")) for key in keys}
    save_file(tensors, file)
    return tensors


@pytest.mark.parametrize("family", KEYS)
def test_prompts_are_those_of_diffusers_own_loading(
    lora: Callable[..., Path], bases: dict[str, Path], family: str
) -> None:
    file = lora(family=family)
    rows = write_tokens(file.with_name("y2k_emb.safetensors"), KEYS[family])
    assert read_adapter(file).tokens.keys() == {"<s0>", "<s1>"}
    ours = load_adapted(bases[family], file.parent, device="cpu")[0]
    theirs = load_components(bases[family])
    pipeline = theirs.pipeline()
    for key, encoder, tokenizer in zip(rows, theirs.text_encoders, theirs.tokenizers, strict=True):
        pipeline.load_textual_inversion(
            rows[key], token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=tokenizer
        )
    prompts = ["a photo of a <s0><s1> mug", "a <s0> mug", "<s1>, red"]
    wanted = encode_prompts(theirs, prompts)
    plain = encode_prompts(load_components(bases[family]), prompts)
    for name in ("encoder_hidden_states", "pooled")[: 1 if wanted.pooled is None else 2]:
        expected = getattr(wanted, name)
        ours_of = getattr(encode_prompts(ours, prompts), name)
        torch.testing.assert_close(ours_of, expected, rtol=0, atol=1e-6)
        assert (getattr(plain, name) - expected).abs().max() > 1e-3


def test_they_are_named_by_inspect_and_written_by_convert(
    lora: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora()
    rows = write_tokens(file.with_name("y2k_emb.safetensors"), ["clip_l"])["clip_l"]
    assert main(["inspect", str(file.parent)]) == 0
    assert "<s0> (1 vector), <s1> (1 vector)" in capsys.readouterr().out
    written = convert_adapter(file, tmp_path / "mug.safetensors", "kohya", family="sd1").embeddings
    for number, path in enumerate(written.values()):
        assert torch.equal(load_file(path)["emb_params"], rows[number : number + 1])


# Name of the adapter -> file beside it -> whether it is read, named, or of something else.
BESIDE = {
    LORA: {
        "y2k_emb.safetensors": "read", "other_emb.safetensors": "read", "y2k_emb.bin": "named",
        "learned_embeds.bin": "named", "learned_embeds-steps-500.safetensors": "named",
        "embeddings/s.safetensors": "named", "pytorch_lora_weights.pt": "named",
        "optimizer.bin": "", "README.md": "", "y2k.safetensors": "", "member.safetensors": "",
    },
    "mug.safetensors": {
        "mug_emb.safetensors": "read", "mug-embedding.pt": "named", "mug.pt": "named",
        "mug_emb_2.safetensors": "named", "learned_embeds.bin": "named", "cup_emb.safetensors": "",
        "mug_cup_emb.safetensors": "", "mug_v2.safetensors": "", "mug.png": "", "smug.pt": "",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "name"), [(adapter, name) for adapter, names in BESIDE.items() for name in names]
)
def test_a_file_that_is_not_read_is_named(
    lora: Callable[..., Path], bases: dict[str, Path], adapter: str, name: str
) -> None:
    file, what = lora(adapter), BESIDE[adapter][name]
    write_tokens(file.parent / name, ["clip_l"])
    note = f"next to it and not read: {name}"
    read = read_adapter(file)
    assert (bool(read.tokens), note in read.notes) == (what == "read", what == "named")
    assert (note in inspect_adapter(file).notes) == (what == "named")
    if what == "named":
        assert (
            note
            in convert_adapter(
                file, file.parent.parent / "o.safetensors", "kohya", family="sd1"
            ).notes
        )
        with pytest.warns(UserWarning, match=f"{adapter}: next to it and not read"):
            load_adapted(bases["sd1"], file, device="cpu")


def test_tokens_of_another_model_and_damaged_ones_are_refused(
    lora: Callable[..., Path], bases: dict[str, Path]
) -> None:
    file = lora()
    beside = file.with_name("y2k_emb.safetensors")
    write_tokens(beside, ["clip_l"], width=48)
    with pytest.raises(AdapterFormatError, match="<s0> was made for another model: it has 48"):
        load_adapted(bases["sd1"], file, device="cpu")
    beside.write_bytes(b"damaged")
    with pytest.raises(AdapterFormatError, match="y2k_emb"):
        read_adapter(file)
