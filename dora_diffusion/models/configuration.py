"""Configurations and tokenizers for single-file models, without downloads.

A single file contains only weights. This package includes the configurations of the released models
and the merges of CLIP's byte-pair encoding (arXiv:2103.00020; see the license in the same folder),
from which the vocabulary is computed.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import WEIGHT_COMPONENTS, Family
from dora_diffusion.formats.checkpoint.models import read_json
from dora_diffusion.formats.checkpoint.schedule import EPSILON, PREDICTION, NoiseSchedule, V
from dora_diffusion.models.families import find_class

RELEASED = Path(__file__).parent / "released"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Temporary folders, removed when the process ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def require_prediction(name: str, family: Family, schedule: NoiseSchedule) -> None:
    """Check that the prediction type of a model is known.

    Raises:
        ValueError: If it is unknown.
    """
    if not schedule.prediction_type:
        both = {
            kind: released_config(family, kind)["unet"]["sample_size"] * 8 for kind in (V, EPSILON)
        }
        choices = " or ".join(
            f"{kind} (as the release of {side} pixels)" for kind, side in both.items()
        )
        raise ValueError(
            f"{name} does not state whether it predicts the noise or v, and {family.title} has "
            f"both; set --prediction_type {choices}"
        )


@lru_cache
def released_config(family: Family, prediction_type: str) -> dict[str, Any]:
    """Return the configuration of a released model, with components, scheduler and tokenizers.

    Args:
        family: Family of the model.
        prediction_type: Prediction type of the release.

    Raises:
        ValueError: If this package has no configuration of the family.
    """
    if not family.configuration:
        raise ValueError(
            f"a single file of {family.title} has no configuration, tokenizer or other parts; set "
            "--model_config to a Diffusers folder of the model"
        )
    text = (RELEASED / f"{family.configuration}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    for kind in (EPSILON, V):
        changes = config.pop(kind, {})
        for part, values in changes.items() if kind == prediction_type else ():
            config[part] |= values
    config["unet"]["in_channels"] = family.in_channels()
    config["scheduler"][PREDICTION] = prediction_type
    return config


@lru_cache
def released_folder(family: Family, prediction_type: str) -> Path:
    """Create a Diffusers folder of a released model without weights, for the process's lifetime."""
    config, home = released_config(family, prediction_type), tempfile.TemporaryDirectory()
    _FOLDERS.append(home)
    folder = Path(home.name)
    index: dict[str, Any] = {
        "_class_name": family.pipeline_class,
        "scheduler": ["diffusers", config["scheduler"]["_class_name"]],
        **{part: ["transformers", "CLIPTokenizer"] for part in family.tokenizer_names},
        **{
            part: ["transformers" if part.startswith("text") else "diffusers", kind]
            for part, kind in module_classes(family).items()
        },
    }
    index |= {
        name: [None, None] if value is None else value
        for name, value in family.pipeline_options(True).items()
        if name != "add_watermarker"
    }
    _write(folder / "model_index.json", index)
    for part in WEIGHT_COMPONENTS:
        if part in config:
            _write(folder / part / "config.json", config[part])
    _write(folder / "scheduler" / "scheduler_config.json", config["scheduler"])
    for part in family.tokenizer_names:
        write_tokenizer(folder / part, **config[part])
    return folder


def module_classes(family: Family) -> dict[str, str]:
    """Return the class names of the modules (Diffusers and Transformers), by component."""
    encoders = zip(family.text_encoder_names, family.text_encoder_classes, strict=True)
    return {family.denoiser: family.denoiser_class, "vae": family.vae_class, **dict(encoders)}


def is_released(folder: Path) -> bool:
    """Return whether a folder was created by `released_folder`."""
    return any(Path(home.name) == folder for home in _FOLDERS)


def empty_module(folder: Path, kind: str, family: Family) -> Any:
    """Build a module from the configuration in a folder, with parameters on the meta device."""
    from accelerate import init_empty_weights
    from diffusers import ConfigMixin
    from transformers.initialization import no_init_weights

    config = read_json(folder / "config.json")
    # Diffusers must be imported before `no_init_weights`: after each load, it restores the
    # functions that torch.nn.init had at import.
    module_class = find_class(family.code, kind)
    is_diffusers = issubclass(module_class, ConfigMixin)
    # Files do not need to contain buffers.
    with init_empty_weights(include_buffers=False), no_init_weights():
        if is_diffusers:
            return module_class.from_config(config)
        return module_class(module_class.config_class(**config))


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write the CLIP tokenizer of the released models, with 49,408 tokens."""
    merges = gzip.decompress((RELEASED / "merges.txt.gz").read_bytes()).decode("utf-8")
    _write(folder / "vocab.json", vocabulary(merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    words = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write(folder / "tokenizer_config.json", config | words)


def vocabulary(merges: str) -> dict[str, int]:
    """Return CLIP's tokens with ids: bytes, bytes at the end of a word, merged pairs, start, end.

    Args:
        merges: A version line, then one line for each pair, in the order of merging.
    """
    # Non-printable bytes come last and are represented by other characters.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    pairs = merges.splitlines()[1:]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += [pair.replace(" ", "") for pair in pairs]
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
