"""Base and adapters of an image to repeat are looked up by hash and name, in the image's order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.cli.lookup import find_base, match_adapters
from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.files.stream import save_tensors
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.images import (
    RecordedAdapter,
    adapters_of,
    model_hash,
    parameters_text,
    parse_parameters,
    save_image,
)
from dora_diffusion.sampling.settings import ImageRow, SamplingSettings
from tests.properties import at_least

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
RESULT = "pytorch_lora_weights.safetensors"


def adapter(path: Path, value: float) -> Path:
    """A file of one layer, the smallest that is an adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{LAYER}.lora_down.weight": torch.full((1, 2), value),
        f"{LAYER}.lora_up.weight": torch.ones(2, 1),
        f"{LAYER}.alpha": torch.tensor(1.0),
    }
    return save_tensors(path, weights)


def image_of(path: Path, used, base: str = "embedded:tiny-sd") -> Path:
    text = parameters_text(ImageRow("a mug", 3), SamplingSettings(steps=1), (8, 8), base, used)
    return save_image(Image.new("RGB", (1, 1)), path, text)


def requested(**given):
    return GenerateSettings.read({"output": "x.png", **given})


def facts(request) -> list[tuple[Path, float, float]]:
    """File, strength in the text encoders and in the UNet of each adapter that is requested."""
    listed = []
    for use in request.uses():
        own = MergeStrengths.of(use.strengths)
        shares = (own.strength * own.text_encoder_strength, own.strength * own.unet_strength)
        listed.append((Path(use.path).resolve(), *shares))
    return listed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters two of which have one name, and one a name that texts write in another way."""
    root = tmp_path_factory.mktemp("adapters")
    names = ("mug.safetensors", "b/mug.safetensors", f"dog/{RESULT}", "a, b.safetensors")
    return root, [adapter(root / name, value) for value, name in enumerate(names)]


NUMBERS = st.floats(-2, 2).map(lambda value: 0.0 if value == 0 else value)


@at_least(40)
@given(st.data())
def test_a_request_for_adapters_is_repeated_whatever_they_are(folder, data) -> None:
    root, files = folder
    chosen = data.draw(st.lists(st.tuples(st.sampled_from(files), NUMBERS, NUMBERS), max_size=4))
    given = {"strength": data.draw(NUMBERS), "magnitude_strength": data.draw(NUMBERS)}
    words = [f"{file}:{first!r}:{second!r}" for file, first, second in chosen]
    first = requested(base="embedded:tiny-sd", prompt="a mug", adapter=words or None, **given)
    used = [RecordedAdapter.of(use.path, use.strengths) for use in first.uses()]
    source = image_of(root / "x.png", used)
    again = requested(repeat=str(source), adapter_dir=str(root))
    assert facts(again) == facts(first)
    assert again.model.base == first.model.base
    assert not chosen or again.model.magnitude_strength == given["magnitude_strength"]
    # The same where files are given, once each, in any order.
    shuffled = data.draw(st.permutations(sorted({str(file) for file, *_ in chosen})))
    assert facts(requested(repeat=str(source), adapter=shuffled or None)) == facts(first)


def test_hashes_of_one_name_keep_their_places() -> None:
    """Also where a folder of several files is among them, which has no hash."""
    one = MergeStrengths()
    used = [RecordedAdapter(*each) for each in (
        ("mug", one, "0" * 12), ("dog",), ("mug",), ("mug", one, "1" * 12),
    )]  # fmt: skip
    text = parameters_text(ImageRow("a mug", 3), SamplingSettings(steps=1), (8, 8), "cats", used)
    assert adapters_of(parse_parameters(text)) == (used, [])


def test_texts_of_other_programs_keep_order_and_name_what_is_not_read() -> None:
    text = (
        "a <lora:x:1:lbw=1,0, 1> mug <lora:a, b:.5:0.25:64> <lora:x> <lora:y:te=2>\n"
        'Steps: 2, Seed: 5, Lora hashes: "x: 012345abcdef, y: fedcba543210"'
    )
    adapters, unread = adapters_of(parse_parameters(text))
    shares = [
        (a.name, a.strengths.text_encoder_strength, a.strengths.unet_strength, a.hash)
        for a in adapters
    ]
    assert shares == [
        ("x", 1, 1, "012345abcdef"), ("a_ b", 0.5, 0.25, ""), ("x", 1, 1, "012345abcdef"),
        ("y", 1, 1, "fedcba543210"),
    ]  # fmt: skip
    assert [line.rpartition("> ")[2] for line in unread] == [
        "<lora:x:1:lbw=1,0,1>: lbw=1,0,1", "<lora:a_ b:.5:0.25:64>: 64", "<lora:y:te=2>: te=2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mug.safetensors", f"mug/{RESULT}", "other.safetensors"])
@pytest.mark.parametrize("place", ["adapter_dir", "runs", "beside", "."])
def test_an_adapter_is_found_in_each_folder_by_name_or_hash(
    place, name, tmp_path, monkeypatch, capsys
) -> None:
    for folder in ("adapter_dir", "runs", "beside"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    file, wrong = adapter(Path(place, name), 1), adapter(Path("adapter_dir/zz.safetensors"), 2)
    used = [RecordedAdapter.of(file, MergeStrengths(0.5))._replace(name="mug")]
    source = image_of(Path("beside/x.png"), used)
    found = requested(repeat=str(source), adapter_dir="adapter_dir")
    assert facts(found) == [(file.resolve(), 0.5, 0.5)]
    line = capsys.readouterr().err
    assert line == f"found for x.png: embedded:tiny-sd, {found.uses()[0].path}\n"
    # Without a hash the name alone counts.
    source = image_of(Path("beside/x.png"), [used[0]._replace(hash="")])
    if "other" in name:
        with pytest.raises(ConfigError, match=r"x.png was made with the adapter mug, not found in"):
            requested(repeat=str(source), adapter_dir="adapter_dir")
    else:
        assert facts(requested(repeat=str(source), adapter_dir="adapter_dir")) == facts(found)
    # One of the name with another hash is named and not used.
    wrong = wrong.replace(file.with_name("mug.safetensors"))
    source = image_of(Path("beside/x.png"), [used[0]._replace(hash="0123456789ab")])
    with pytest.raises(ConfigError, match="with another hash: ") as error:
        requested(repeat=str(source), adapter_dir="adapter_dir")
    assert "mug" in str(error.value).partition("with another hash: ")[2]
    assert wrong.exists()


def test_folders_are_searched_in_their_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["adapter_dir", "runs", "beside", "."]
    files = [adapter(tmp_path / place / "mug.safetensors", n) for n, place in enumerate(places)]
    source = image_of(Path("beside/x.png"), [RecordedAdapter("mug")])
    for file in files:
        found = requested(repeat=str(source), adapter_dir="adapter_dir")
        assert facts(found) == [(file, 1, 1)]
        file.unlink()


def test_a_checkpoint_is_found_by_its_name_in_texts(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = adapter(tmp_path / f"runs/my-run/checkpoint-20/{RESULT}", 1)
    adapter(tmp_path / f"runs/my-run/{RESULT}", 2)
    used = RecordedAdapter.of(file)
    assert used.name == "my-run-checkpoint-20"
    for text in (used, used._replace(hash="")):
        assert facts(requested(repeat=str(image_of(Path("x.png"), [text])))) == [(file, 1, 1)]


def test_all_that_is_not_found_is_named_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    used = [
        RecordedAdapter("dog"),
        RecordedAdapter("cat", hash="0123456789ab"),
        RecordedAdapter("dog"),
    ]
    image_of(Path("x.png"), used, "./dogs")
    assert main(["generate", "--repeat", "x.png", "--output", "y.png"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: x.png was made with the model dogs and the adapters dog, cat, not found in runs, .;"
        " give the model with --base, and each adapter's file with --adapter or a folder "
        "above it with --adapter_dir"
    )


def test_given_adapters_are_matched_by_hash_then_name_then_order(folder) -> None:
    _, (mug, other, dog, _) = folder
    image = [RecordedAdapter.of(file) for file in (mug, other, dog)]
    words = [str(dog), f"{other}:0.2", str(mug)]
    assert match_adapters(words, image) == ([str(mug), f"{other}:0.2", str(dog)], [])
    unknown = [used._replace(hash="0" * 12) for used in image]
    assert match_adapters(words, unknown) == ([f"{other}:0.2", str(mug), str(dog)], [])
    nameless = [used._replace(name="x") for used in unknown]
    assert match_adapters([*words, "x"][:3], nameless) == (words, [])
    assert match_adapters(words[:1], nameless) == (["", "", ""], words[:1])
    assert match_adapters(words, image[:1]) == ([str(mug)], words[:2])


def test_an_adapter_that_is_none_of_the_images_is_refused(folder) -> None:
    root, (mug, other, dog, _) = folder
    source = image_of(root / "y.png", [RecordedAdapter.of(mug), RecordedAdapter.of(other)])
    with pytest.raises(ConfigError, match=r"is none of the adapters of y.png \(mug\); leave it"):
        requested(repeat=str(source), adapter=[str(dog)], adapter_dir=str(root))
    # With as many it replaces one, and schedules that are given are in the order of the files.
    more = {"strength_schedule": ["0:0.5", "0:1"]}
    uses = requested(repeat=str(source), adapter=[str(other), str(dog)], **more).uses()
    assert [(use.path, use.schedule[0][1]) for use in uses] == [(str(other), 0.5), (str(dog), 1)]


def test_a_base_is_found_by_hash_name_or_the_adapters_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [Path("models/sd"), Path("elsewhere/deep/sd"), Path("run/sub/sd")]
    for place in places:
        place.mkdir(parents=True)
        (place / "model_index.json").write_text("{}", "utf-8")
    run = adapter(Path(f"run/{RESULT}"), 1)
    for name in ("embedded:tiny-sd", "some/model"):
        assert find_base({"Model": name}, [], [Path()]) == name
    assert find_base({"Model": "sd"}, [], [Path("models")]) == str(places[0])
    assert find_base({"Model": "sd"}, [], [Path("elsewhere")]) == str(places[1])
    for stated in (places[2], "sub/sd"):
        Path("run/config.yaml").write_text(f"pretrained_model_name_or_path: {stated}", "utf-8")
        assert find_base({"Model": "sd"}, [run], [Path("models")]) == str(places[2])
    file = save_tensors(
        Path("models/sd.safetensors"), {FAMILIES["sd1"].checkpoint_key: torch.ones(2)}
    )
    digest, stated = model_hash(file), {"Model": "sd", "Model hash": model_hash(file)}
    assert find_base(stated, [run], [Path()]) == str(file)
    moved = file.replace("models/renamed.safetensors")
    adapter(Path("models/sd.safetensors"), 2)
    assert find_base(stated, [run], [Path()]) == str(moved)
    assert find_base({**stated, "Model hash": digest[::-1]}, [run], [Path()]) is None
    assert find_base({}, [run], [Path()]) is None
