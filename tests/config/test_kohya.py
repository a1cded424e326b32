"""Kohya's folders and sd-scripts' dataset files, against what sd-scripts' own reader computes.

Its tables of options, defaults and captions are restated here (docs/config_README-en.md,
config_util.py and train_util.py of 2026).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.photos import list_photos, read_photos
from dora_diffusion.training.inputs.subject import caption_rules
from tests.every import every
from tests.refusal import refused
from tests.training.helpers import SAMPLES

GENERAL, DATASETS, SUBSETS = "general", "datasets", "subsets"
EVERYWHERE = (GENERAL, DATASETS, SUBSETS)

# Each table of the documentation: option -> where it may be.
DATASET_TABLE = dict.fromkeys(
    ("batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso",
     "min_bucket_reso", "resolution", "skip_image_resolution"), (GENERAL, DATASETS),
)  # fmt: skip
SUBSET_TABLE = dict.fromkeys(
    ("color_aug", "face_crop_aug_range", "flip_aug", "keep_tokens", "num_repeats", "random_crop",
     "shuffle_caption", "caption_prefix", "caption_suffix", "caption_separator",
     "keep_tokens_separator", "secondary_separator", "enable_wildcard", "resize_interpolation"),
    EVERYWHERE,
)  # fmt: skip
DREAMBOOTH_TABLE = {
    "image_dir": (SUBSETS,), "caption_extension": EVERYWHERE, "class_tokens": (SUBSETS,),
    "cache_info": EVERYWHERE, "is_reg": (SUBSETS,),
}  # fmt: skip
FINE_TUNING_TABLE = {"image_dir": (SUBSETS,), "metadata_file": (SUBSETS,)}
DROPOUT_TABLE = dict.fromkeys(
    ("caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate"),
    EVERYWHERE,
)
# What its schema allows besides.
SCHEMA = {
    "alpha_mask": (SUBSETS,), "network_multiplier": (GENERAL, DATASETS),
    "validation_split": (GENERAL, DATASETS), "validation_seed": (GENERAL, DATASETS),
    "token_warmup_min": EVERYWHERE, "token_warmup_step": EVERYWHERE,
    "custom_attributes": EVERYWHERE, "conditioning_data_dir": (SUBSETS,),
}  # fmt: skip
TABLES: dict[str, tuple[str, ...]] = {
    **DATASET_TABLE, **SUBSET_TABLE, **DREAMBOOTH_TABLE, **FINE_TUNING_TABLE, **DROPOUT_TABLE,
    **SCHEMA,
}  # fmt: skip

# Option -> a value, and what sd-scripts computes of it; a text of the refusal where there is one.
VALUES: dict[str, tuple[Any, dict[str, Any] | str]] = {
    "batch_size": (1, {}),
    "bucket_no_upscale": (True, {}),  # without enable_bucket
    "bucket_reso_steps": (32, {"bucket_reso_steps": 32}),
    "enable_bucket": (
        True,
        {"aspect_ratio_buckets": True, "min_bucket_reso": 256, "max_bucket_reso": 1024,
         "bucket_reso_steps": 64},
    ),
    "max_bucket_reso": (768, {"max_bucket_reso": 768}),
    "min_bucket_reso": (128, {"min_bucket_reso": 128}),
    "resolution": ([256, 256], {"resolution": 256}),
    "skip_image_resolution": (768, "move the small images"),
    "color_aug": (True, "colors are not changed"),
    "face_crop_aug_range": ([1.0, 3.0], "crop the images beforehand"),
    "flip_aug": (True, {"random_flip": True}),
    "keep_tokens": (2, {"keep_tags": 2}),
    "num_repeats": (10, {"repeats": 10}),
    "random_crop": (True, "sd-scripts cuts it from the image at its full size"),
    "shuffle_caption": (True, {"shuffle_tags": True, "keep_tags": 0}),
    "caption_prefix": ("best, ", {"caption_prefix": "best, "}),
    "caption_suffix": (", side", "write it into the captions"),
    "caption_separator": (";", {}),  # without tags that are shuffled or dropped
    "keep_tokens_separator": ("|||", "keep_tokens keeps"),
    "secondary_separator": (";;;", "each tag is shuffled by itself"),
    "enable_wildcard": (True, {"caption_per_line": True}),
    "resize_interpolation": ("area", "resized with Lanczos"),
    "caption_extension": ("txt", {}),
    "class_tokens": (
        "sks girl", {"instance_prompt": "sks girl", "token": "sks", "class_word": "girl"}
    ),
    "cache_info": (True, {}),
    "is_reg": (False, {}),
    "metadata_file": ("md.json", "save captions as .txt files next to their images"),
    "caption_dropout_every_n_epochs": (2, "use caption_dropout_rate"),
    "caption_dropout_rate": (0.25, {"caption_dropout": 0.25}),
    "caption_tag_dropout_rate": (0.5, {"tag_dropout": 0.5, "keep_tags": 0}),
    "alpha_mask": (True, {"masked_loss": True}),
    "network_multiplier": (0.5, "trained at strength 1"),
    "validation_split": (0.2, "--validation_split"),
    "validation_seed": (3, {}),
    "token_warmup_min": (1, {}),
    "token_warmup_step": (0.5, "all their tags from the first step"),
    "custom_attributes": ({"a": 1}, "they are not used"),
    "conditioning_data_dir": ("masks", "NAME.mask.png"),
}  # fmt: skip
NOTHING = {"instance_prompt": "", "token": "", "class_word": ""}


def written(path: Path, *subsets: dict[str, Any], **above: Any) -> Path:
    """A dataset file: options by table, in one dataset."""
    dataset = {**above.get("datasets", {}), "subsets": list(subsets)}
    data = {"general": above.get("general", {}), "datasets": [dataset]}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return TrainConfig(dataset_config=str(path), **settings).dataset_config


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two images without captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red").save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Kohya's layout: two folders of photos with captions."""
    for name, sample in (("10_sks mug", "bolt_mug"), ("3_zwx teapot", "heart_teapot")):
        shutil.copytree(SAMPLES / sample, tmp_path / "train" / name)
    for caption in (tmp_path / "train" / "3_zwx teapot").glob("*.txt"):
        text = caption.read_text("utf-8").replace("sks", "zwx")
        caption.write_text(text, encoding="utf-8")
    return tmp_path / "train"


def test_every_option_has_a_value_here_and_a_place_in_the_documents() -> None:
    assert {*TABLES} - {"image_dir"} == {*VALUES}
    page = (SAMPLES.parent / "docs" / "howto" / "from-kohya.md").read_text("utf-8")
    table = page.partition("### My dataset file")[2].partition("\n## ")[0]
    unread = {"validation_seed", "token_warmup_min"}  # of options that are refused
    assert {*TABLES} - unread == {name for name in re.findall(r"`(\w+)`", table) if name in TABLES}


def test_an_option_is_what_sd_scripts_computes_or_refused_by_name(
    images: Path, tmp_path: Path
) -> None:
    with every() as case:
        for option, table in itertools.product(filter(VALUES.get, TABLES), EVERYWHERE):
            with case(f"{option} in {table}"):
                check_option(option, table, images, tmp_path)


def check_option(option: str, table: str, images: Path, tmp_path: Path) -> None:
    value, expected = VALUES[option]
    subset = {"image_dir": str(images)} | ({option: value} if table == SUBSETS else {})
    file = written(tmp_path / "sd.json", subset, **({table: {option: value}}))
    if table not in TABLES[option] and option != "class_tokens":  # which its code takes anywhere
        with refused("dataset_config", f"{option} is an option of [["):
            read(file)
    elif isinstance(expected, str):
        with refused("dataset_config") as error:
            read(file)
        assert str(error.value).startswith(f"{file}: {option} ")
        assert expected in str(error.value)
    else:
        assert read(file) == [{"instance_data_dir": str(images), **NOTHING, **expected}]


@pytest.mark.parametrize("is_random", [False, True])
def test_random_crops_are_those_in_buckets(is_random: bool, images: Path, tmp_path: Path) -> None:
    options = {"enable_bucket": True, "random_crop": is_random, "bucket_reso_steps": 32}
    (entry,) = read(written(tmp_path / "sd.json", {"image_dir": str(images)}, datasets=options))
    assert entry["center_crop"] is not is_random
    assert (entry["min_bucket_reso"], entry["bucket_reso_steps"]) == (256, 32)


def test_toml_and_json_are_one(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    toml = tmp_path / "sd.toml"
    toml.write_text(
        f"[general]\nresolution = 512\n[[datasets]]\nenable_bucket = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\nnum_repeats = 2\n",
        encoding="utf-8",
    )
    subset = {"image_dir": images.as_posix(), "num_repeats": 2}
    above = {"general": {"resolution": 512}, "datasets": {"enable_bucket": True}}
    assert read(toml) == read(written(tmp_path / "sd.json", subset, **above)) != []
    # A list in JSON is one of entries here.
    (tmp_path / "own.json").write_text('[{"instance_data_dir": "a", "repeats": 2}]', "utf-8")
    assert read(tmp_path / "own.json") == [{"instance_data_dir": "a", "repeats": 2}]
    for name in ("bad.json", "bad.toml"):
        (tmp_path / name).write_text("{", "utf-8")
        with refused("dataset_config", f"{name}: this is not valid {name[4:].upper()}"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["sd.toml", "sd.json"])
def test_one_backslash_in_a_path_is_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    text = 'image_dir = "C:\\train\\10_sks dog"' if name == "sd.toml" else '{"a": "C:\\photos"}'
    (tmp_path / name).write_text(text, encoding="utf-8")
    with refused("dataset_config", "write paths with / or \\\\, not with one"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    with refused("dataset_config", f"{name}: this is not valid {name[3:].upper()} "):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 4}, "batch_size 4: give the run --train_batch_size 4 too"),
        ({"resolution": [512, 768]}, "resolution [512, 768] is not supported: write the side of a "
         "square, such as 576; enable_bucket = true gives images other shapes of its area"),
        *(({"resolution": value}, f"resolution is {value}; it must be one whole number, or width")
          for value in ([512], [], [512, "a"], [512, 512, 512], [512.0, 512.0], [True, True])),
        ({"enable_bucket": True, "bucket_no_upscale": True}, "small images are enlarged"),
        ({"unheard_of": 1}, "[[datasets]]: there is no option unheard_of"),
        ({"shuffle_caption": True, "caption_prefix": "x"}, "caption_prefix with shuffle_caption"),
        ({"shuffle_caption": True, "caption_separator": ";"}, "sd-scripts joins the tags by comma"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused_with_a_reason(
    options: dict[str, Any], said: str, images: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "sd.json", {"image_dir": str(images)}, datasets=options)
    with refused("dataset_config") as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert said in str(error.value)


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    """Of every table and subset, as flags are; what stands above two subsets once."""
    folder, file = tmp_path.as_posix(), tmp_path / "sd.toml"
    file.write_text(
        f"""
        dataset = []
        [general]
        enable_buckt = true
        [[datasets]]
        resolution = "512"
        [[datasets.subsets]]
        image_dir = "{folder}"
        num_repeats = "two"
        color_aug = true
        rnak = 4
        [[datasets.subsets]]
        caption_prefix = "sks"
        shuffle_caption = true
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "{folder}"
        batch_size = 2
        """,
        encoding="utf-8",
    )
    wanted = (
        "dataset: there are only",
        "[general]: there is no option enable_buckt (did you mean enable_bucket?)",
        "[[datasets]]: resolution is '512'; it must be",
        "[[datasets.subsets]]: num_repeats is 'two'; it must be a whole number",
        "color_aug is not supported",
        "[[datasets.subsets]]: there is no option rnak",
        "a [[datasets.subsets]] has no image_dir",
        "caption_prefix with shuffle_caption is not supported",
        "[[datasets.subsets]]: batch_size is an option of [[datasets]]",
    )
    with refused("dataset_config") as error:
        TrainConfig(dataset_config=str(file))
    message = str(error.value)
    assert [text for text in (*wanted, str(file)) if message.count(text) != 1] == []
    assert len(error.value.parts) == len(wanted)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"general": 1}, "[general] must be a table"),
        ({"datasets": {"subsets": []}}, "[[datasets]] must be a list of tables; write two br"),
        ({"datasets": [{"subsets": {}}]}, "[[datasets.subsets]] must be a list of tables; write"),
        ({"datasets": 1}, "[[datasets]] must be a list of tables"),
        ({"datasets": [{"subsets": [1]}]}, "[[datasets.subsets]] must be a list"),
        ({"datasets": [{"subsets": [{}]}]}, "has no image_dir"),
        ({"dataset": []}, "dataset: there are only [general] and [[datasets]]"),
        ({}, "there is no [[datasets.subsets]] to train on"),
    ],
)
def test_a_file_of_another_shape_is_refused(data: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "sd.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with refused("dataset_config", said):
        read(file)


EXTENSIONS = (None, "txt", ".txt", "caption", ".caption", ".other", "")


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("files", [(), (".txt",), (".caption",), (".txt", ".caption")])
def test_the_extension_of_captions_is_as_there_or_refused(
    extension: str | None, files: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    for suffix in files:
        (images / "a").with_suffix(suffix).write_text(f"a cat of {suffix}", encoding="utf-8")
    options = {"image_dir": str(images), "class_tokens": "sks girl"}
    options |= {} if extension is None else {"caption_extension": extension}
    given = ".caption" if extension is None else extension
    there = given if given.startswith(".") or not given else f".{given}"
    caption = f"a cat of {there}" if there in files else "sks girl"
    file = written(tmp_path / "sd.json", options)
    if there != ".txt" and {there, ".txt"} & {*files}:
        with refused("dataset_config", 'caption_extension = ".txt"'):
            read(file)
        return
    entry = read(file)[0]
    photos = read_photos(list_photos(images), entry["instance_prompt"])
    assert photos[0].caption == caption
    assert photos[1].caption == "sks girl"


def theirs(text: str, prefix: str, draws: bool) -> set[str]:
    """All captions that sd-scripts may train of a caption file without braces."""
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line] if draws else lines[:1]
    return {tokens(f"{prefix} {line}") for line in lines}


def tokens(caption: str) -> str:
    """Tokens of a caption: words and punctuation."""
    return " ".join(re.findall(r"\w+|[^\w\s]", caption))


# Text of a caption file -> whether it is in sd-scripts as here, without and with wildcards there.
CAPTIONS = {
    "a sks dog": (True, True), "a sks dog\n\n": (True, True),
    "  a   sks dog \r\n": (True, True), "a sks dog\na cat": (False, True),
    "\na sks dog": (False, True), "a {red|blue} dog": (True, False),
    "a {{red|blue}} dog": (True, False), "a {red dog": (True, False),
    "a }red dog": (True, False), r"saber \(fate\)": (True, True),
    "a __red__ dog": (True, True), "a|b dog": (True, True), "1_2_3 __ dog": (True, True),
}  # fmt: skip


def test_captions_are_those_of_sd_scripts_or_refused(images: Path, tmp_path: Path) -> None:
    (images / "0.txt").write_text("a cat", encoding="utf-8")  # which is none of the next one's
    Image.new("RGB", (40, 40), "blue").save(images / "0.png")
    with every() as case:
        for text, prefix, draws in itertools.product(CAPTIONS, ("", "best, "), (False, True)):
            with case((text, prefix, draws)):
                check_captions(text, prefix, draws, images, tmp_path / "sd.json")


def check_captions(text: str, prefix: str, draws: bool, images: Path, file: Path) -> None:
    same = CAPTIONS[text]
    (images / "a.txt").write_text(text, encoding="utf-8")
    options = {"caption_extension": ".txt", "enable_wildcard": draws, "class_tokens": "sks dog"}
    options |= {"caption_prefix": prefix}
    written(file, {"image_dir": str(images), **options})
    has_lines = len(text.strip().splitlines()) > 1
    if not same[draws] or (draws and has_lines and prefix):
        with refused("dataset_config", f"{file.name}: "):
            read(file)
        return
    (subject,) = TrainConfig(dataset_config=str(file)).subjects
    rules = caption_rules(subject)
    prompt = subject.instance_prompt or ""
    _, photo, bare = read_photos(list_photos(images), prompt, per_line=True)
    drawn = {tokens(rules.draw(photo.caption, "epoch", number)) for number in range(200)}
    assert drawn == theirs(text, prefix, draws)
    drawn = {tokens(rules.draw(bare.caption, "epoch", number)) for number in range(50)}
    assert drawn == theirs("sks dog", prefix, draws)


def test_the_first_of_two_subsets_of_one_folder_counts(images: Path, tmp_path: Path) -> None:
    folder = {"image_dir": str(images)}
    file = written(
        tmp_path / "sd.json", {**folder, "num_repeats": 0}, {**folder, "num_repeats": 2},
        {**folder, "num_repeats": 5}, {**folder, "is_reg": True},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="is left out, as sd-scripts does") as told:
        entries = read(file)
    assert [entry["repeats"] for entry in entries] == [2]
    reasons = ["num_repeats is less than 1", *["this dataset has it already"] * 2]
    said = [str(w.message) for w in told if w.category is UserWarning]
    assert [line.rpartition(": ")[2] for line in said] == reasons
    data = json.loads(file.read_text("utf-8"))
    data["datasets"] = [{"subsets": [folder]}, {"subsets": [folder], "resolution": 768}]
    file.write_text(json.dumps(data), encoding="utf-8")
    assert [entry.get("resolution") for entry in read(file)] == [None, 768]


def test_regularisation_images_are_class_images(
    images: Path, folders: Path, tmp_path: Path
) -> None:
    mug = {"image_dir": str(folders / "10_sks mug"), "class_tokens": "sks mug"}
    reg = {"image_dir": str(images), "is_reg": True, "class_tokens": "mug"}
    general = {"caption_extension": ".txt"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (entry,) = read(written(tmp_path / "sd.json", mug, reg, general=general))
    assert {name: value for name, value in entry.items() if "class" in name} == {
        "class_word": "mug", "class_data_dir": str(images), "class_prompt": "mug",
        "num_class_images": 2,
    }  # fmt: skip
    assert (entry["with_prior_preservation"], entry["prior_preservation_mode"]) == (True, "images")
    unlike = {"num_repeats": 3, "flip_aug": True, "shuffle_caption": True, "caption_prefix": "x"}
    for name, value in unlike.items():
        file = written(tmp_path / "sd.json", mug, {**reg, name: value}, general=general)
        with pytest.warns(UserWarning, match=f"is_reg: {name} of image_dir .* without effect"):
            read(file)
    teapot = {"image_dir": str(folders / "3_zwx teapot"), "class_tokens": "zwx teapot"}
    for subsets, said in (
        ([mug, {**reg, "class_tokens": ""}], "has no class_tokens, so that sd-scripts trains the"),
        ([mug, reg, {**reg, "image_dir": str(folders)}], "several is_reg subsets"),
        ([mug, teapot, reg], "subjects of several classes"),
        ([mug, {**reg, "image_dir": str(tmp_path)}], "of is_reg holds no images"),
        ([reg], "to train on"),
    ):
        with refused("dataset_config", said):
            read(written(tmp_path / "sd.json", *subsets, general=general))


def test_what_sd_scripts_would_read_of_its_cache_is_said(images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "sd.json", {"image_dir": str(images), "cache_info": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(file)
    (images / "metadata_cache.json").write_text("{}", encoding="utf-8")
    with pytest.warns(UserWarning, match="cache_info has no effect: images and captions are read"):
        read(file)


def test_a_byte_order_mark_that_sd_scripts_trains_is_named(images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "sd.json", {"image_dir": str(images), "caption_extension": ".txt",
                                          "class_tokens": "sks dog"})  # fmt: skip
    for encoding in ("utf-8", "utf-8-sig"):
        (images / "a.txt").write_text("a sks dog", encoding=encoding)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read(file)
        marks = [str(w.message) for w in caught if "the byte order mark of a.txt" in str(w.message)]
        assert len(marks) == (encoding == "utf-8-sig")


def test_kohya_folders_are_the_same_images_as_often(folders: Path) -> None:
    (folders / "notes").mkdir()
    with pytest.warns(UserWarning, match="left out notes; name a subject's folder like"):
        entries = TrainConfig(dataset_config=str(folders)).dataset_config
    assert entries == [
        {
            "instance_data_dir": str(folders / "10_sks mug"), "repeats": 10, "token": "sks",
            "instance_prompt": "sks mug", "class_word": "mug",
        },
        {
            "instance_data_dir": str(folders / "3_zwx teapot"), "repeats": 3, "token": "zwx",
            "instance_prompt": "zwx teapot", "class_word": "teapot",
        },
    ]  # fmt: skip
    with refused("dataset_config", "holds no folder such as '10_sks dog'", "the one around it"):
        TrainConfig(dataset_config=str(folders / "10_sks mug"))
    with refused("dataset_config", "holds no folder such as") as info:
        TrainConfig(dataset_config=str(folders / "notes"))
    assert str(info.value).endswith("class)")
