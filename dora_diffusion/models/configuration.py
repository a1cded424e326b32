"""Configuration and tokenizers of single files: those of the released models, in this package.

A single file holds weights alone. What `RELEASED` holds of each kind of model is small, and CLIP's
vocabulary follows from the merges of its byte-pair encoding (arXiv:2103.00020; see the license
beside them), so that nothing is downloaded.
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

RELEASED = Path(__file__).parent / "released"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# They are removed when the process ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def require_prediction(name: str, family: Family, schedule: NoiseSchedule) -> None:
    """Refuse a model of which nobody says what it predicts.

    Raises:
        ValueError: With the two that it may be.
    """
    if not schedule.prediction_type:
        both = {
            kind: released_config(family, kind)["unet"]["sample_size"] * 8 for kind in (V, EPSILON)
        }
        choices = " or ".join(
            f"{kind} (as the release of {side} pixels)" for kind, side in both.items()
        )
        raise ValueError(
            f"{name} does not say whether it predicts the noise or v, as {family.title} has both: "
            f"give --prediction_type {choices}"
        )


@lru_cache
def released_config(family: Family, prediction_type: str) -> dict[str, Any]:
    """The configuration of a released model: of each component, its scheduler and tokenizers.

    Args:
        family: Of the model.
        prediction_type: Where two releases differ in it, which one.
    """
    text = (RELEASED / f"{family.configuration}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    for kind in (EPSILON, V):
        other = config.pop(kind, {})
        for part, values in other.items() if kind == prediction_type else ():
            config[part] |= values
    config["unet"]["in_channels"] = family.in_channels()
    config["scheduler"][PREDICTION] = prediction_type
    return config


@lru_cache
def released_folder(family: Family, prediction_type: str) -> Path:
    """A Diffusers folder of a released model without its weights, as long as the process lives."""
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
    """The class of each module, by component: Diffusers', of text encoders transformers'."""
    encoders = zip(family.text_encoder_names, family.text_encoder_classes, strict=True)
    return {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **dict(encoders)}


def is_released(folder: Path) -> bool:
    """Return whether a folder is one that `released_folder` made."""
    return any(Path(home.name) == folder for home in _FOLDERS)


def empty_module(folder: Path, kind: str) -> Any:
    """A module of a class as its folder configures it, its parameters without memory."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = read_json(folder / "config.json")
    # Imported before: what Diffusers finds in torch.nn.init then, it sets back after each load.
    is_diffusers = hasattr(diffusers, kind)
    found: Any = getattr(diffusers if is_diffusers else transformers, kind)
    # Buffers are not weights, and no file needs to have them.
    with init_empty_weights(include_buffers=False), no_init_weights():
        if is_diffusers:
            return found.from_config(config)
        return found(transformers.CLIPTextConfig(**config))


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write CLIP's tokenizer as the released models have it: 49,408 tokens."""
    merges = gzip.decompress((RELEASED / "merges.txt.gz").read_bytes()).decode("utf-8")
    _write(folder / "vocab.json", vocabulary(merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    words = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write(folder / "tokenizer_config.json", config | words)


def vocabulary(merges: str) -> dict[str, int]:
    """CLIP's tokens with their numbers: bytes, bytes that end a word, merged pairs, two more.

    Args:
        merges: A line for each pair, the first that is merged first, below a line of the version.
    """
    # Bytes that cannot be printed have stand-ins, and come last.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    pairs = merges.splitlines()[1:]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += [pair.replace(" ", "") for pair in pairs]
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
