"""The finishing touches of a written pipeline folder, for every version of the libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def finish_folder(output: Path, tokenizer: Path) -> None:
    """Make a folder that diffusers wrote open alike everywhere.

    Args:
        output: the pipeline folder.
        tokenizer: where the classic tokenizer files are, which transformers 5 does not write.
    """
    for part in sorted(output.glob("tokenizer*")):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer / name, part / name)
        _edit_config(part / "tokenizer_config.json", is_local=None)
    for part in sorted(output.glob("text_encoder*")):
        _write_published_names(part / "model.safetensors")
        _edit_config(part / "config.json", dtype="float32")
    _edit_config(output / "vae" / "config.json", _name_or_path=None)
    for file in output.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for its owner alone


def _edit_config(file: Path, **changes: str | None) -> None:
    """Set keys of a JSON file, or drop those that are None.

    The text encoder's type is one: without a ``torch_dtype``, transformers opens a model in the
    type that its config names, but diffusers opens its own in float32, and both must agree.
    """
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if changes.get(key, "") is not None}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_published_names(file: Path) -> None:
    """Prefix the encoder's keys with ``text_model.``, as in published checkpoints.

    Transformers 5 leaves it out when it saves; every version reads it.
    """
    from safetensors.torch import load_file, save_file

    prefix = "text_model."
    named = {
        key if key.startswith("text_projection") else prefix + key.removeprefix(prefix): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(named, file, metadata={"format": "pt"})
