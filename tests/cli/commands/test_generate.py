"""``dora-diffusion generate``: what it refuses before a model is loaded, and what it writes."""

from __future__ import annotations

import json
import math
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion.cli.axes import plan_grid
from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.cli.main import main
from dora_diffusion.cli.repeat import Repeated
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.images import parse_parameters, read_parameters, save_image


@pytest.fixture
def generate(sd1_folder, tmp_path, capsys):
    """Run the command with changes; returns (exit code, its error line)."""

    def run(**changes):
        settings = {
            "base": sd1_folder,
            "prompt": "a dog",
            "output": tmp_path / "image.png",
            "steps": 1,
            "seed": 3,
            **changes,
        }
        flags = []
        for name, value in settings.items():
            if value is True:
                flags.append(f"--{name}")
            elif value is not None:
                # With "=", so that a negative number is not taken for a flag.
                flags.append(f"--{name}={value}")
        code = main(["generate", *flags])
        lines = capsys.readouterr().err.splitlines()
        return code, next((line for line in lines if line.startswith("error: ")), "")

    return run


def test_images_are_not_replaced_unasked(generate, tmp_path):
    (tmp_path / "image.png").write_text("mine", encoding="utf-8")
    code, error = generate()
    assert code == 1
    assert "image.png exists; choose another --output, or replace it with --overwrite" in error
    assert (tmp_path / "image.png").read_text(encoding="utf-8") == "mine"
    assert generate(overwrite=True) == (0, "")
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_of_several_images_none_is_replaced(generate, tmp_path):
    (tmp_path / "image-4.png").write_text("mine", encoding="utf-8")
    code, error = generate(num_images=2)
    assert code == 1
    assert "image-4.png exists" in error
    assert not (tmp_path / "image-3.png").exists()


def test_an_adapter_that_breaks_the_numbers_is_an_error_and_no_black_image(
    generate, sd1_folder, tmp_path
):
    from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
    from dora_diffusion.adapters.state import save_adapter

    components = load_components(sd1_folder)
    inject_adapters(components.denoiser, AdapterConfig(targets=("attention",), rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(components.denoiser):
            parameter.add_(1e30)
    adapter = save_adapter({"unet": components.denoiser}, tmp_path / "adapter")
    code, error = generate(adapter=adapter)
    assert code == 1
    assert "the image of seed 3 is not finite" in error
    assert not (tmp_path / "image.png").exists()


def run(sd1_folder, output, *more):
    return main(
        ["generate", "--base", str(sd1_folder), "--prompt", "a photo of a sks mug",
         "--steps", "2", "--output", str(output), *more]
    )  # fmt: skip


def test_images_carry_their_seed_and_settings(sd1_folder, trained, tmp_path, capsys):
    more = ("--adapter", str(trained), "--seed", "5", "--num_images", "2", "--strength", "0.5")
    assert run(sd1_folder, tmp_path / "x.png", *more) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-5.png", "x-6.png"]
    assert "(seed 6)" in capsys.readouterr().out
    facts = parse_parameters(read_parameters(tmp_path / "x-6.png"))
    assert facts["Prompt"] == "a photo of a sks mug"
    assert (facts["Seed"], facts["Steps"], facts["Size"]) == ("6", "2", "64x64")
    assert (facts["Adapter strength"], facts["Adapter"]) == ("0.5", trained.name)
    assert run(sd1_folder, tmp_path / "y.png", *more[:2], "--seed", "6", *more[-2:]) == 0
    one, other = (
        np.asarray(Image.open(tmp_path / name), np.int16) for name in ("x-6.png", "y.png")
    )
    assert np.abs(one - other).max() <= 1


def test_partial_strengths_are_written_into_the_image(sd1_folder, trained, tmp_path):
    path, adapter = tmp_path / "x.png", ("--adapter", str(trained))
    part = ("--direction_strength", "0.5", "--magnitude_strength", "0")
    assert run(sd1_folder, path, *adapter, *part) == 0
    facts = parse_parameters(read_parameters(path))
    assert (facts["Direction strength"], facts["Magnitude strength"]) == ("0.5", "0")
    assert facts["Adapter strength"] == "1"
    assert run(sd1_folder, path, *adapter, "--overwrite") == 0
    assert "Direction" not in read_parameters(path)
    assert "Magnitude" not in read_parameters(path)


def test_a_random_seed_is_shown(sd1_folder, tmp_path, capsys):
    assert run(sd1_folder, tmp_path / "x.png") == 0
    seed = parse_parameters(read_parameters(tmp_path / "x.png"))["Seed"]
    assert f"(seed {seed})" in capsys.readouterr().out


def test_a_forgotten_trigger_word_is_told_before_it_takes_time(
    sd1_folder, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        "dora_diffusion.sampling.generate.generate_images", lambda *args, **options: 1 / 0
    )
    more = ("--adapter", str(trained), "--prompt", "a photo of a mug")
    assert run(sd1_folder, tmp_path / "x.png", *more) == 1
    assert "lacks the adapter's trigger word" in capsys.readouterr().err


def test_strengths_of_the_command_are_not_those_of_an_adapters_file(
    sd1_folder, trained, tmp_path, capsys
):
    rows = adapters_file(tmp_path, str(trained), {"adapter": str(trained), "strength": 0.5})
    more = ["--adapters_file", str(rows), "--prompt", "a sks mug", "--strength=0.3"]
    assert run(sd1_folder, tmp_path / "x.png", *more, "--direction_strength=0.7") == 0
    error = capsys.readouterr().err
    for name in ("strength", "direction_strength"):
        assert f"{name} has no effect because no adapter is given" in error
    said = [parse_parameters(read_parameters(tmp_path / f"x-{n}.png")) for n in (1, 2)]
    assert [each["Adapter strength"] for each in said] == ["1", "0.5"]
    assert not any("Direction strength" in each for each in said)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--base", "./nowhere"), "nowhere does not exist"),
        (("--adapter", "nowhere"), "there is no adapter at nowhere"),
        (("--adapter", "{photos}"), "no adapter file in it"),
        (("--adapter", "{broken}"), "broken.safetensors"),
        (("--output", "x.gif"), "x.gif must end in .png, .jpg"),
        (
            ("--prompt", "a <lora:x:1> mug"),
            "<lora:x:1> in the prompt is not read; give the file of an adapter with --adapter",
        ),
        (("--prompt", "<hypernet:x:1>"), "<hypernet:x:1> in the prompt is not read"),
        (("--prompt", "Negative prompt: x"), "give that as the negative prompt"),
        (("--strength", "9", "--adapter", "{trained}:50"), "unet_strength is 50; it must be"),
        (("--mask", "{mask}"), "a mask_image belongs to an image of its size"),
        (("--repeat", "nowhere.png"), "nowhere.png cannot be read"),
        (("--repeat", "{broken}"), "broken.safetensors cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(more, message, sd1_folder, trained, photos, tmp_path, last_line):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor file")
    mask = save_image(Image.new("RGB", (64, 64)), tmp_path / "mask.png")
    places = {"photos": photos, "broken": broken, "trained": trained, "mask": mask}
    more = [part.format_map(places) for part in more]
    assert run(sd1_folder, tmp_path / "x.png", *more) == 1
    line = last_line()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "x.png").exists()


def test_the_line_of_a_library_does_not_precede_ours(sd1_folder, tmp_path, capfd):
    """Diffusers logs an error, and then raises it."""
    assert run(sd1_folder, tmp_path / "x.png", "--variant", "fp16") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "it has no 'fp16' variant" in line


def adapters_file(folder, *entries):
    file = folder / "rows.yaml"
    file.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return file


def test_images_of_one_batch_have_each_their_adapter(sd1_folder, random_adapter, tmp_path):
    """Each is the image that its adapter alone gives, read as its file says, and says so."""
    files = [
        write_adapter(tmp_path / f"{seed}.safetensors", AdapterFile(
            random_adapter(sd1_folder, seed=seed, every=3, mixed_ranks=True),
            AdapterMetadata("sd1", extra={"clip_skip": str(seed - 1)})))
        for seed in (1, 2)
    ]  # fmt: skip
    entries = [
        {"adapter": str(files[0]), "seed": 9},
        {"adapter": str(files[1]), "strength": 0.5, "prompt": "a red toy dog"},
        None,
        str(files[1]),
    ]
    rows, out, alone = adapters_file(tmp_path, *entries), tmp_path / "out.png", tmp_path / "1.png"

    def generated(output, **flags):
        flags = {"base": sd1_folder, "steps": 2, "seed": 3, "prompt": "a dog", **flags}
        named = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        assert main(["generate", *named, f"--output={output}", "--overwrite"]) == 0

    # The last entry is a batch of its own.
    generated(out, adapters_file=rows, batch_size=3)
    seen = []
    for number, entry in enumerate(entries):
        own = entry if isinstance(entry, dict) else {"adapter": entry}
        generated(alone, **{"seed": number + 3} | own)
        mixed = out.with_stem(f"out-{number + 1}")
        pixels = [np.asarray(Image.open(path)).astype(int) for path in (mixed, alone)]
        assert abs(pixels[0] - pixels[1]).max() <= 1
        assert read_parameters(mixed) == read_parameters(alone)
        assert ("Clip skip: 2" in read_parameters(mixed)) == (number in (1, 3))
        seen.append(pixels[0].tobytes())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("entries", "flags", "message"),
    [
        ([], [], "must be a list with an entry for each image"),
        (
            [{"adaptr": "x"}],
            [],
            r"entry 1 of .*: there is no setting adaptr \(did you mean adapter\?\)",
        ),
        ([None, {"seed": "x"}], [], "entry 2 of .*: seed is 'x'; it must be a whole number"),
        ([{"adapter": "x", "strength": 70}], [], "strength of entry 1 of .* is 70; it must be"),
        ([None, {"strength": math.nan}], [], "entry 2 of .*: strength is nan; it must be a finite"),
        ([[]], [], "entry 1 of .*: it must be 'adapter: FILE'"),
        ([{"seed": -1}], [], "entry 1 of .*: seed is -1; it must not be negative"),
        ([{"seed": 2**63}], [], f"entry 1 of .*: seed is {2**63}; it must be at most"),
        ([{"seed": math.nan}], [], "entry 1 of .*: seed is nan; it must be a whole number"),
        ([None], ["--adapter", "x"], "adapter and adapters_file are both given"),
        ([None], ["--num_images", "2"], "num_images is 2, and .* has an entry for each image"),
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused(entries, flags, message, tmp_path, capsys):
    rows = adapters_file(tmp_path, *entries)
    output = ["--output", tmp_path / "x.png", "--prompt", "a dog"]
    assert (
        main(["generate", *map(str, ["--base=x", "--adapters_file", rows, *output, *flags])]) == 1
    )
    assert re.search(message, capsys.readouterr().err)


def test_without_a_prompt_nothing_is_made(tmp_path, capsys):
    flags = ["generate", "--base", "x", "--output", str(tmp_path / "x.png")]
    assert main(flags) == 1
    assert "generate has no prompt; say with --prompt what to show" in capsys.readouterr().err
    rows = adapters_file(tmp_path, {"prompt": "a dog"}, None)
    assert main([*flags, "--adapters_file", str(rows)]) == 1
    assert "entry 2 of" in capsys.readouterr().err


def test_a_prompt_that_holds_an_images_text_is_one_line(generate):
    for name in ("prompt", "negative_prompt"):
        said = generate(**{name: "a mug\nSteps: 12, Seed: 7"})[1]
        what = f"the {name.replace('_', ' ')} holds the settings of an image ('Steps: 12, Seed: 7')"
        assert f"{what}; make it again with --repeat IMAGE" in said


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def repeat(base, source, output, *more):
    words = ["--base", base, "--repeat", source, "--output", output, "--overwrite", *more]
    return main(["generate", *map(str, words)])


def test_an_image_is_repeated_bit_for_bit(sd1_folder, trained, tmp_path, capsys):
    flags = ("--adapter", str(trained), "--strength", "0.7", "--direction_strength", "0.9",
             "--guidance_scale", "4.123456789", "--scheduler", "dpm++_karras", "--width", "40",
             "--height", "72", "--negative_prompt", "blurry, (red)\nsmall", "--seed", "11",
             "--clip_skip", "1", "--max_token_length", "150")  # fmt: skip
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert run(sd1_folder, first, *flags) == 0
    assert repeat(sd1_folder, first, again, "--adapter", trained) == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert read_parameters(first) == read_parameters(again)
    assert "warning" not in capsys.readouterr().err
    # A flag takes precedence; what the others are is still the image's.
    assert repeat(sd1_folder, first, again, "--adapter", trained, "--seed", "12") == 0
    changed = parse_parameters(read_parameters(first)) | {"Seed": "12"}
    assert parse_parameters(read_parameters(again)) == changed
    assert not np.array_equal(pixels(first), pixels(again))
    assert repeat(sd1_folder, first, again) == 1
    error = capsys.readouterr().err
    assert f"first.png was made with the adapters {trained.name}: give the file of each" in error


@pytest.mark.parametrize("axes", [[], ["steps=1, 2"]])
def test_an_image_to_repeat_is_read_once(axes, tmp_path, monkeypatch):
    """For its settings, and for what no setting holds; one that was replaced is read again."""
    text = "a dog\nSteps: 2, Seed: 3, Clip skip: 2, Model: dogs, Version: dora_diffusion 0.1.0"
    image, read = save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", text), []

    def read_once(path):
        read.append(path)
        return read_parameters(path)

    monkeypatch.setattr("dora_diffusion.sampling.images.read_parameters", read_once)
    given = {"base": "cats", "output": tmp_path / "b", "repeat": image, "grid": axes}
    settings = GenerateSettings.read(given)
    for cell in plan_grid(settings).cells.values() if axes else [settings]:
        with pytest.warns(UserWarning, match="made with the model dogs, not cats"):
            repeated = Repeated.of(cell, cell.sampling)
        assert repeated.fields == parse_parameters(text)
    assert read == [image]
    save_image(Image.new("RGB", (8, 8)), image, text.replace("a dog", "two dogs"))
    assert GenerateSettings.read(given).prompt == "two dogs"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_images_of_other_formats_are_written_and_repeated(suffix, sd1_folder, tmp_path):
    first = tmp_path / f"first{suffix}"
    assert run(sd1_folder, first, "--seed", "4", "--dtype", "bfloat16") == 0
    assert run(sd1_folder, tmp_path / "exact.png", "--seed", "4", "--dtype", "bfloat16") == 0
    assert repeat(sd1_folder, first, tmp_path / "again.png") == 0
    assert np.array_equal(pixels(tmp_path / "exact.png"), pixels(tmp_path / "again.png"))
    assert read_parameters(first) == read_parameters(tmp_path / "again.png")
    assert np.abs(pixels(first).astype(int) - pixels(tmp_path / "exact.png")).mean() < 20


def test_another_base_or_adapter_than_an_images_is_told(sd1_folder, trained, tmp_path, capsys):
    text = (
        "a sks mug <lora:dog:0.5>\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 64x64, "
        'Clip skip: 2, Model: other, ENSD: 31337, Lora hashes: "dog: 0123456789ab"'
    )
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", text)
    assert repeat(sd1_folder, path, tmp_path / "again.png", "--adapter", trained) == 0
    error = capsys.readouterr().err
    assert "of x.png, this has no meaning here: ENSD: 31337" in error
    assert "x.png was made with the model other, not" in error
    assert "x.png was made with another adapter file (dog: 0123456789ab) than" in error
    fields = parse_parameters(read_parameters(tmp_path / "again.png"))
    assert (fields["Adapter strength"], fields["Clip skip"]) == ("0.5", "2")
    assert (fields["Sampler"], fields["Max token length"]) == ("euler", "0")


def test_several_adapters_are_written_and_repeated(
    sd1_folder, trained, random_adapter, tmp_path, capsys
):
    other = write_adapter(
        tmp_path / "other one.safetensors",
        AdapterFile(random_adapter(sd1_folder, seed=2, every=3), AdapterMetadata("sd1")),
    )
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    words = [f"{trained}:0.7", f"{other}:0.3:-0.6"]
    assert run(sd1_folder, first, "--seed", "3", "--adapter", *words, "--strength", "0.9") == 0
    fields = parse_parameters(read_parameters(first))
    assert fields["Adapter"] == f"{trained.name}, other one"
    assert fields["Adapter strength"] == f"{0.9 * 0.7!r}, {0.9 * 0.3!r}:{0.9 * -0.6!r}"
    assert [pair.split(": ")[0] for pair in fields["Lora hashes"].split(", ")] == [
        trained.name, "other one",
    ]  # fmt: skip
    # Strengths are found by the adapters' hashes, in whichever order their files are given.
    for files in ((trained, other), (other, trained)):
        assert repeat(sd1_folder, first, again, "--adapter", *files) == 0
        assert np.array_equal(pixels(first), pixels(again))
        assert read_parameters(first) == read_parameters(again)
        assert "warning" not in capsys.readouterr().err
    # One of two is missing.
    assert repeat(sd1_folder, first, again, "--adapter", trained) == 1
    assert f"the adapters {trained.name}, other one: give" in capsys.readouterr().err


def test_a_base_and_adapters_that_an_image_names_by_a_path_are_taken(
    sd1_folder, random_adapter, tmp_path, monkeypatch, capsys
):
    files = [tmp_path / "mug.safetensors", tmp_path / "dog.safetensors"]
    for seed, file in enumerate(files, start=1):
        layers = random_adapter(sd1_folder, seed=seed, every=3)
        write_adapter(file, AdapterFile(layers, AdapterMetadata("sd1")))
    words = [f"{files[0]}:0.9", f"{files[1]}:0.3", f"{files[0]}:0.2:0.4"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert run(sd1_folder, first, "--seed", "3", "--adapter", *words) == 0
    command = ["generate", "--repeat", str(first), "--output", str(again)]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert f"was made with the model {sd1_folder.name}: give it with --base" in (
        capsys.readouterr().err
    )
    (tmp_path / sd1_folder.name).symlink_to(sd1_folder, target_is_directory=True)
    assert main(command) == 0
    assert first.read_bytes() == again.read_bytes()
    assert "warning" not in capsys.readouterr().err


def test_images_over_others_are_repeated(sd1_folder, tmp_path, capsys):
    first = tmp_path / "first.png"
    assert run(sd1_folder, first, "--seed", "4", "--width", "72", "--height", "96") == 0
    image = ("--image", str(first), "--denoise", "0.6", "--seed", "4", "--steps", "3")
    over = tmp_path / "over.png"
    assert run(sd1_folder, over, *image) == 0
    assert repeat(sd1_folder, over, tmp_path / "b.png", "--image", first) == 0
    assert np.array_equal(pixels(over), pixels(tmp_path / "b.png"))
    assert "warning" not in capsys.readouterr().err
    assert repeat(sd1_folder, over, tmp_path / "b.png", "--image", over) == 0
    assert "over.png was made over another image than" in capsys.readouterr().err
    assert repeat(sd1_folder, over, tmp_path / "b.png") == 1
    assert "over.png was made over another image; give that with --image" in capsys.readouterr().err
    mask, whole, into = (tmp_path / f"{name}.png" for name in ("mask", "whole", "into"))
    Image.new("L", (72, 96), 255).save(whole)
    Image.linear_gradient("L").resize((72, 96)).point(lambda v: 255 * (v > 128)).save(mask)
    assert run(sd1_folder, into, *image, "--mask", str(mask)) == 0
    again = ("--image", first, "--mask", mask)
    assert repeat(sd1_folder, into, tmp_path / "b.png", *again) == 0
    assert np.array_equal(pixels(into), pixels(tmp_path / "b.png"))
    assert "warning" not in capsys.readouterr().err
    assert repeat(sd1_folder, into, tmp_path / "b.png", *again[:3], whole) == 0
    assert "into.png was made over another image than the mask" in capsys.readouterr().err


def test_brackets_are_text_and_repeated(sd1_folder, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    prompt = ("--prompt", "a (red) dog on [grass]", "--negative_prompt", "a (cat)")
    assert run(sd1_folder, first, *prompt, "--seed", "4") == 0
    assert parse_parameters(read_parameters(first))["Emphasis"] == "None"
    assert repeat(sd1_folder, first, again) == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert read_parameters(first) == read_parameters(again)
    assert "warning" not in capsys.readouterr().err
    assert run(sd1_folder, first, "--prompt", "a (dog:1.2)", "--overwrite") == 0
    assert "(word:1.2) and BREAK, which weigh words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "name"),
    [("DPM++ 2M Karras", "dpm++_karras"), ("Euler a", "euler_a"), ("DPM++ 2M", "dpm++"),
     ("dpm++ 2m sde karras", "dpm++_sde_karras"), ("unipc", "unipc")],
)  # fmt: skip
def test_samplers_have_a1111s_names_too(word, name, sd1_folder, tmp_path):
    path = tmp_path / "x.png"
    assert run(sd1_folder, path, "--seed", "1", "--scheduler", word) == 0
    assert parse_parameters(read_parameters(path))["Sampler"] == name


def few_step_model(sd1_folder, folder, scheduler, **unet):
    """A copy of a model with another scheduler, and a UNet of its own where that is changed."""
    shutil.copytree(sd1_folder, folder)
    # Diffusers takes the class from the index.
    index = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, change in (
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        values = json.loads((folder / name).read_text(encoding="utf-8")) | change
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    if unet:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        torch.manual_seed(0)
        shutil.rmtree(folder / "unet")
        diffusers.UNet2DConditionModel.from_config(config | unet).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    ("scheduler", "unet", "guidance"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, {}, 1),
        ({"_class_name": "LCMScheduler"}, {"time_cond_proj_dim": 16}, 8),
    ],
    ids=["turbo", "lcm"],
)
def test_few_step_models_are_sampled_as_they_are_for(
    scheduler, unet, guidance, sd1_folder, tmp_path, capsys
):
    """The image is that of Diffusers' own pipeline, and what is given counts more."""
    model = few_step_model(sd1_folder, tmp_path / "model", scheduler, **unet)
    flags = ["generate", f"--base={model}", "--prompt=a dog", "--seed=3"]

    def made(name, *more):
        assert main([*flags, f"--output={tmp_path / name}", *more]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "few steps" in line]
        return parse_parameters(read_parameters(tmp_path / name)), said

    facts, said = made("a.png")
    assert (facts["Steps"], facts["CFG scale"]) == ("4", str(guidance))
    assert "Sampler" not in facts
    (line,) = said
    assert line.startswith(f"{model} is for few steps (")
    assert line.endswith(
        f"steps 4, guidance_scale {guidance:.1f}; --steps, --guidance_scale take precedence"
    )
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    generator = torch.Generator().manual_seed(3)
    (expected,) = pipeline(
        "a dog", num_inference_steps=4, guidance_scale=guidance, generator=generator
    ).images
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected, np.int16))
    facts, (line,) = made("b.png", "--steps=3")
    assert (facts["Steps"], facts["CFG scale"]) == ("3", str(guidance))
    assert line.endswith(f": guidance_scale {guidance:.1f}; --guidance_scale take precedence")
    facts, said = made("c.png", "--steps=3", "--guidance_scale=2")
    assert (facts["Steps"], facts["CFG scale"], said) == ("3", "2", [])
    assert repeat(model, tmp_path / "a.png", tmp_path / "d.png") == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "d.png"))


def test_few_step_adapters_are_known_by_their_released_names(
    sd1_folder, random_adapter, tmp_path, capsys
):
    layers = random_adapter(sd1_folder, seed=1, every=3)
    names = "sdxl_lightning_2step_lora", "lcm-lora-sdv1-5", "lightning"
    files = [
        write_adapter(tmp_path / f"{name}.safetensors", AdapterFile(layers, AdapterMetadata("sd1")))
        for name in names
    ]
    said = []
    for number, file in enumerate(files):
        path = tmp_path / f"{number}.png"
        flags = ["--base", str(sd1_folder), "--prompt=x", "--seed=3", "--adapter", f"{file}:0.1"]
        assert main(["generate", *flags, f"--output={path}", *["--steps=3"] * (number == 2)]) == 0
        facts = parse_parameters(read_parameters(path))
        said.append([facts.get(name) for name in ("Steps", "CFG scale", "Sampler")])
    assert said == [["2", "1", "euler_trailing"], ["4", "1", "lcm"], ["3", "7.5", None]]
    lines = [line for line in capsys.readouterr().err.splitlines() if "few steps" in line]
    assert lines[0].startswith("sdxl_lightning_2step_lora is for few steps (Lightning): steps 2, ")
    assert lines[1].endswith("; --steps, --guidance_scale, --scheduler take precedence")
    assert len(lines) == 2
