"""Write a model some of whose tensors were trained: the base with these in place of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dora_diffusion.export.base import model_name, open_model
from dora_diffusion.export.card import trained_card
from dora_diffusion.export.folder.plan import plan_folder
from dora_diffusion.export.folder.write import write_folder
from dora_diffusion.export.merged import MergedModel
from dora_diffusion.export.notes import BASE, TRAINED
from dora_diffusion.export.output import ExportError, check_output
from dora_diffusion.export.single_file import write_single_file
from dora_diffusion.export.vae import WithVae, open_vae
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, modelspec_fields
from dora_diffusion.formats.checkpoint.weights import ModelWeights, StoredModel
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.wording import listing


def export_trained(
    base: str | Path,
    tensors: Mapping[str, Callable[[], Tensor]],
    output: str | Path,
    metadata: AdapterMetadata,
    *,
    vae: str | Path | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model that was trained from a base, streamed one tensor at a time, atomically.

    Args:
        base: What it was trained from: a Diffusers folder, a hub id, ``embedded:NAME`` or a single
            ``.safetensors`` file. What was not trained is its own, to the last bit.
        tensors: Canonical name -> what gives the trained tensor. It is cast to the dtype that the
            base stores.
        output: A name ending in ``.safetensors`` gives one file in the original layout, any other
            a Diffusers folder.
        metadata: What is known of the training: trigger words, steps.
        vae: Another autoencoder, which takes the place of the base's.
        variant: Weight variant of the base, such as ``"fp16"``.
        config: For a folder made from a single file: a Diffusers folder with its configuration.
        overwrite: Replace an output that exists.

    Returns:
        The output path.

    Raises:
        ExportError: If the output exists, or the base has no such tensor.
        DiskFullError: If there is not enough space; nothing is changed then.
    """
    output = Path(output).expanduser()
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(base, variant))
        check_output(output, model.path, (), overwrite)
        new_vae = None if vae is None else stack.enter_context(open_vae(vae))
        weights: ModelWeights = WithVae(model, new_vae) if new_vae else model
        merged = MergedModel(WithTensors(weights, tensors), ())
        notes = TrainedNotes(model, metadata, output)
        if output.suffix == ".safetensors":
            write_single_file(merged, model.single_file(), output, notes, None)
            return output
        plan = plan_folder(model, config)
        if new_vae is not None:
            plan = plan.with_tensors("vae", new_vae.specs)
        write_folder(merged, plan, output, notes, None, new_vae.config if new_vae else None)
    return output


class WithTensors:
    """A base model with some tensors in place of its own.

    Raises:
        ExportError: If the base does not have one of them.
    """

    def __init__(self, base: ModelWeights, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        if unknown := tensors.keys() - base.specs.keys():
            raise ExportError(f"the base has no {listing(sorted(unknown), 3)}")
        self.base, self.tensors, self.family = base, tensors, base.family
        self.specs: Mapping[str, TensorSpec] = base.specs

    def __getitem__(self, name: str) -> Tensor:
        """The trained tensor, not rounded, or that of the base."""
        return self.tensors[name]() if name in self.tensors else self.base[name]


class TrainedNotes:
    """What the files of a trained model say of it, as `MergeNotes` does of a merged one."""

    def __init__(self, model: StoredModel, metadata: AdapterMetadata, output: Path) -> None:
        self._base, self._title = model_name(model.path), output.resolve().name
        self._trigger = metadata.trigger
        steps = metadata.extra.get("training_steps", "")
        self._fields = {
            "format": "pt",
            BASE: json.dumps({"name": self._base}),
            TRAINED: json.dumps({"training_steps": steps, "trigger": metadata.trigger}),
        }
        if output.suffix == ".safetensors":
            prediction_type = metadata.extra.get("prediction_type", "")
            self._fields |= modelspec_fields(
                model.family, output.stem, metadata.trigger, prediction_type
            )

    def card(self, old: str) -> str:
        """The model card of a folder; ``old`` is that of the base."""
        return trained_card(self._title, self._base, self._trigger, old)

    def draft(self) -> dict[str, str]:
        """The metadata."""
        return self._fields

    final = draft
