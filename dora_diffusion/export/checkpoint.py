"""Write a merged or trained model as a Diffusers folder or one file in the original layout.

Tensors are streamed one at a time into a temporary file next to the output, which is reopened,
checked and then renamed. An interrupted export leaves no files and keeps an existing output.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.families import WEIGHT_COMPONENTS
from dora_diffusion.config.pipeline_index import component_classes, index_file
from dora_diffusion.config.schedulers import to_zero_snr
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    ProgressReporter,
    check_model_output,
    check_space,
    refuse_existing,
    replace_folder,
    temporary_sibling,
)
from dora_diffusion.export.merge_spec import Adapters, MergeSpec
from dora_diffusion.export.merged import MergedModel, Overlay, VaeFile, check_sample, open_base
from dora_diffusion.export.metadata import ModelMetadata, merged_metadata, trained_metadata
from dora_diffusion.formats.adapter.embeddings import embedding_notes, is_written, write_embeddings
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, without_path
from dora_diffusion.formats.checkpoint.models import (
    WEIGHT_SUFFIXES,
    StoredModel,
    read_index,
    read_json,
)
from dora_diffusion.formats.checkpoint.schedule import (
    ZERO_SNR,
    ScheduleInfo,
    choose_schedule,
    usual_of,
)
from dora_diffusion.formats.checkpoint.weights import UNET_PREFIX, VAE_PREFIXES, Entry, SingleFile
from dora_diffusion.formats.files.atomic import atomic_file, save_text
from dora_diffusion.formats.files.stream import TensorSpec, write_tensors
from dora_diffusion.formats.names.modules import BUFFERS, canonical
from dora_diffusion.numerics.weights import MergeStrengths

# Tensors of one weight file: name in the file -> canonical name.
Shard = dict[str, str]

WEIGHT_PREFIXES = (
    UNET_PREFIX, *VAE_PREFIXES, "cond_stage_model.", "conditioner.", "text_encoders.",
)  # fmt: skip
# Stable Diffusion 2 folders lack the text encoder's last layer and projection.
UNUSED = ("text_encoder.text_projection.", "text_encoder.text_model.encoder.layers.")


def export_checkpoint(  # noqa: PLR0913 - keywords, each documented
    base: AnyModel,
    adapters: Adapters,
    output: str | PathLike[str],
    *,
    strength: float | MergeStrengths = 1.0,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    complete: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Merge adapters into a base model and write the result.

    A model has the vocabulary of its base. Tokens that were trained with an adapter are written as
    textual-inversion files, to a folder ``embeddings`` next to a single file or inside a folder.

    Args:
        base: A diffusers folder, a hub id, ``embedded:NAME``, or a single ``.safetensors``
            checkpoint in the original layout; or one of these as a `BaseModel`. Its ``vae``
            replaces the model's; its ``model_config`` configures a folder made from a single file.
        adapters: An adapter file or output folder, or several as ``[(adapter, strength), ...]``,
            whose strengths are multiplied by ``strength``. Their order does not matter. With none
            (``()``) the output is the base itself, in this layout and dtype.
        output: A name ending in ``.safetensors`` gives one file in the original layout
            (`inspect_model` reports how each program reads it); any other name gives a diffusers
            folder.
        strength: 0 is the base, 1 the adapter as trained; `MergeStrengths` sets all strengths.
        alpha: Alpha of adapters whose files do not store it. None assumes their rank, with a
            warning.
        dtype: Dtype of the UNet and the text encoders; None keeps the base's. The VAE keeps its
            dtype, since SDXL's overflows in half precision.
        complete: One file also has the text encoders and the autoencoder if programs expect these
            in separate files (Z-Image). Files of other families are always complete.
        overwrite: Replace an existing output.
        on_progress: Called with (bytes written, total bytes).

    Returns:
        The output path.

    Raises:
        ExportError: If the output exists, the written file fails its check, the base's ``vae``
            would not be in it, or no program reads a complete file of the family.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        DiskFullError: If there is not enough space. Nothing is changed then.

    Warns:
        UserWarning: If an alpha was assumed, or tokens were written to files.
    """
    output, base = Path(output).expanduser(), BaseModel.of(base)
    spec = MergeSpec(adapters, MergeStrengths.of(strength))
    inputs = [*spec.files(), *([Path(base.vae).expanduser()] if base.vae else [])]
    with open_base(base) as (model, weights, vae):
        check_model_output(output, model.path, inputs, overwrite)
        refusal = model.family.refused.get("complete")
        if complete and refusal:
            raise ExportError(
                f"complete cannot be used with {model.family.title}: {refusal}; leave it out"
            )
        complete = complete or not model.family.has_separate_files
        if vae is not None and output.suffix == ".safetensors" and not complete:
            raise ExportError(
                f"{output.name} contains the diffusion model alone, without the VAE {base.vae}; "
                f"leave out --vae, {'' if refusal else 'give --complete, '}or export a folder"
            )
        read = spec.read(weights, alpha)
        spec.warn_of_assumptions()
        model.override_schedule(base, [adapter.metadata for adapter in read])
        words = spec.embeddings(model.path, output)
        refuse_existing((word[0] for word in words if not is_written(*word)), overwrite)
        merged = MergedModel(weights, spec.weighted(), dtype)
        files = [(token, file) for file, token, _ in words]
        metadata = merged_metadata(model, spec, output, files, base)
        with contextlib.closing(metadata):
            writer = _Writer(merged, model, metadata, complete, on_progress)
            writer.write(output, base.model_config, vae)
        for file, token, vectors in words:
            write_embeddings({token: file}, {token: vectors})
    for note in embedding_notes(output, dict(files)):
        warnings.warn(f"{output.name}: {note}", stacklevel=2)
    return output


def export_trained(
    base: BaseModel,
    tensors: Mapping[str, Callable[[], Tensor]],
    output: str | Path,
    metadata: AdapterMetadata,
    *,
    words: Mapping[str, Path] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model that was trained from a base, streamed one tensor at a time, atomically.

    Args:
        base: The model that was trained. Its other tensors are kept, bit for bit.
        tensors: Canonical name -> function that returns the trained tensor.
        output: A name ending in ``.safetensors`` gives one file in the original layout, any other
            a Diffusers folder. An existing output is replaced.
        metadata: Metadata of the training: trigger words, steps.
        words: Files of the trained words, for the metadata and the card.
        dtype: Dtype of the UNet and the text encoders; None keeps the base's.

    Returns:
        The output path.

    Raises:
        ExportError: If an existing output is not a model, or the base lacks a tensor.
        DiskFullError: If there is not enough space. Nothing is changed then.
    """
    output = Path(output).expanduser()
    with open_base(base) as (model, weights, vae):
        check_model_output(output, model.path, (), True)
        if unknown := tensors.keys() - weights.specs.keys():
            raise ExportError(f"the base has no {listing(sorted(unknown), 3)}")
        trained = MergedModel(Overlay(weights, tensors), (), dtype)
        facts = replace(metadata, base_model=without_path(str(base.path)))
        model.override_schedule(base, [facts])
        described = trained_metadata(model, metadata, output, words or {})
        complete = not model.family.has_separate_files
        with contextlib.closing(described):
            _Writer(trained, model, described, complete).write(output, base.model_config, vae)
    return output


@dataclass
class _Writer:
    """Writer of a model with its metadata.

    Attributes:
        merged: Weights of the model.
        model: The base. It provides the layout of a file or the other files of a folder.
        metadata: Metadata of the model.
        complete: Whether a single file has more than the denoiser.
        on_progress: Called with (bytes written, total bytes).
    """

    merged: MergedModel
    model: StoredModel
    metadata: ModelMetadata
    complete: bool = True
    on_progress: OnProgress | None = None

    def write(self, output: Path, config: str | PathLike[str] | None, vae: VaeFile | None) -> None:
        """Write a ``.safetensors`` file, or a folder, atomically.

        Args:
            output: The file or folder.
            config: For a folder made from a single file: a Diffusers folder with the configuration
                and tokenizers. None uses the released model's.
            vae: An autoencoder that replaces the base's.

        Raises:
            ExportError: If a single file does not fit the configuration.
            ValueError: If no configuration is given, and two released models could be the file's.
        """
        if output.suffix != ".safetensors":
            source, shards = self.model.path, self.model.shards()
            if self.model.is_single_file:
                source = _configuration(config, self.model)
                shards = _shards_of(self.model, source)
            if vae is not None:
                shards["vae"] = [_shard("vae", vae.specs)]
            # For a symbolic link, replace the folder that it points to.
            self._folder(output.resolve(), source, shards, vae.config if vae else None)
            return
        layout = self.model.single_file(complete=self.complete)
        total = sum(spec.nbytes for spec in self._specs(layout).values())
        check_space(output, total)
        with atomic_file(output) as temporary:
            self._file(temporary, layout, ProgressReporter(total, self.on_progress))

    def _specs(self, layout: SingleFile) -> dict[str, TensorSpec]:
        specs = {entry.key: entry.spec(self.merged.specs) for entry in layout.entries}
        return specs | dict(layout.other_specs)

    def _file(self, file: Path, layout: SingleFile, report: ProgressReporter) -> None:
        """Write one weight file and check it."""
        entries = {entry.key: entry for entry in layout.entries}

        def load(key: str) -> Tensor:
            return self.merged.build(entries[key]) if key in entries else layout.load_other(key)

        draft, final = self.metadata.draft(), self.metadata.final
        write_tensors(file, self._specs(layout), load, draft, final, report.step)
        check_sample(file, layout.entries, self.merged)

    def _folder(
        self, output: Path, source: Path, shards: Mapping[str, list[Shard]], vae: Path | None
    ) -> None:
        """Write a Diffusers folder.

        File names have no variant, even if a variant was read. Weights in other formats and single
        files next to the components contain the unmerged model and are not copied.

        Args:
            output: The folder.
            source: The folder from which other files (configs, tokenizers) are copied.
            shards: The weight files of each component.
            vae: Config that replaces the autoencoder's.
        """
        index = read_index(source)
        other_files = _other_files(source, index, shards)
        # Settings to correct in the source's scheduler config.
        settings = self.model.schedule() if self.model.is_single_file else self.model.restated
        if settings.get(ZERO_SNR):
            kind = read_json(source / "scheduler" / "scheduler_config.json")["_class_name"]
            settings = to_zero_snr({"_class_name": kind, **settings})
            index["scheduler"] = ["diffusers", settings["_class_name"]]
        names = (name for files in shards.values() for shard in files for name in shard.values())
        total = sum(self.merged.specs[name].nbytes for name in names)
        check_space(output, total + sum(file.stat().st_size for file in other_files))
        report, card = ProgressReporter(total, self.on_progress), ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            card = (source / "README.md").read_text(encoding="utf-8")
        with temporary_sibling(output) as temporary:
            for file in other_files:
                target = temporary / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            if vae is not None:
                shutil.copyfile(vae, temporary / "vae" / "config.json")
            save_text(temporary / "README.md", self.metadata.card(card))
            for component, files in shards.items():
                self._component(component, files, temporary / component, report)
            _update(temporary / "scheduler" / "scheduler_config.json", settings)
            save_text(temporary / index_file(source).name, _dump(_index_of(temporary, index)))
            replace_folder(temporary, output)

    def _component(
        self, component: str, shards: list[Shard], folder: Path, report: ProgressReporter
    ) -> None:
        """Write the weight files of one component.

        Keys of text encoders have the prefix ``text_model.``, which every version of transformers
        reads. Without it, versions before 5.6 load a random encoder, with a warning.
        """
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        places, total = dict[str, str](), 0
        for number, shard in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = folder / f"{stem}{part}.safetensors"
            entries = [Entry(key, (name,)) for key, name in shard.items()]
            self._file(file, SingleFile(entries, {}, dict[str, Tensor]().__getitem__), report)
            places |= dict.fromkeys(shard, file.name)
            total += sum(self.merged.specs[name].nbytes for name in shard.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            save_text(folder / f"{stem}.safetensors.index.json", _dump(index))
        config, dtype = folder / "config.json", self.merged.dtype
        if component != "vae" and dtype is not None and config.is_file():
            # A transformers config states the dtype of its weights.
            noted = [key for key in ("dtype", "torch_dtype") if key in read_json(config)]
            _update(config, dict.fromkeys(noted, str(dtype).removeprefix("torch.")))


def _configuration(config: str | PathLike[str] | None, checkpoint: StoredModel) -> Path:
    """Return the folder with configuration and tokenizers: the given one or the released model's.

    Raises:
        ValueError: If none is given, and two released models could be the file's.
        ModelNotFoundError: If the given one does not exist.
    """
    from dora_diffusion.models.configuration import released_folder, require_prediction
    from dora_diffusion.models.locate import resolve_folder

    if config is not None:
        return resolve_folder(config)
    statements = [ScheduleInfo("", checkpoint.schedule()), *usual_of(checkpoint.family)]
    schedule = choose_schedule(checkpoint.path.name, statements)
    require_prediction(checkpoint.path.name, checkpoint.family, schedule)
    return released_folder(checkpoint.family, schedule.prediction_type)


def _shards_of(checkpoint: StoredModel, config: Path) -> dict[str, list[Shard]]:
    """Return the weight files of a folder made from a single file, one for each component.

    Args:
        checkpoint: The file.
        config: A Diffusers folder with the configuration.

    Raises:
        ExportError: If the file's tensors differ from the configuration: one is missing, has
            another shape, or is not in it.
    """
    from dora_diffusion.models.configuration import empty_module, is_released

    modules = {
        component: empty_module(config / component, kind, checkpoint.family)
        for component, kind in component_classes(read_index(config)).items()
        if component in WEIGHT_COMPONENTS
    }
    shapes = {
        canonical(component, key): tuple(tensor.shape)
        for component, module in modules.items()
        for key, tensor in module.state_dict().items()
        if not key.endswith(BUFFERS)
    }
    stored_shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    shapes = {n: s for n, s in shapes.items() if n.partition(".")[0] not in checkpoint.left_out}
    missing = [name for name, shape in shapes.items() if stored_shapes.get(name) != shape]
    extra = [name for name in stored_shapes if name not in shapes and not name.startswith(UNUSED)]
    extra += weights_of_no_component(checkpoint.other_specs)
    if missing or extra:
        whose = "the released model's configuration" if is_released(config) else config
        raise ExportError(
            f"{whose} is for another model than {checkpoint.path.name}: "
            f"{listing(missing or extra, 3)} {'differ' if missing else 'would be left out'}; give "
            "a Diffusers folder of its shape with --model_config"
        )
    shards = {name: _shard(name, shapes) for name in WEIGHT_COMPONENTS}
    return {name: [shard] for name, shard in shards.items() if shard}


def weights_of_no_component(keys: Iterable[str]) -> list[str]:
    """Return the keys of a single file with a component's prefix, but no place in a component."""
    named = (key for key in keys if key.startswith(WEIGHT_PREFIXES))
    return [key for key in named if not key.endswith(BUFFERS) and ".loss." not in key]


def _shard(component: str, names: Iterable[str]) -> Shard:
    prefix = f"{component}."
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def _other_files(folder: Path, index: Mapping[str, Any], written: Collection[str]) -> list[Path]:
    """Return the files of a pipeline to copy unchanged: all but weights of written components."""
    files = [file for file in folder.iterdir() if file.is_file() and file.name[0] != "."]
    files = [file for file in files if not _is_weight(file)]
    for name, value in index.items():
        if isinstance(value, list) and (folder / name).is_dir():
            inside = [file for file in (folder / name).rglob("*") if file.is_file()]
            files += [f for f in inside if name not in written or not _is_weight(f)]
    return sorted(files)


def _is_weight(file: Path) -> bool:
    return file.name.endswith(WEIGHT_SUFFIXES) or ".safetensors.index." in file.name


def _index_of(folder: Path, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the index of a folder, without components that the folder lacks.

    Otherwise a download without the safety checker would give a folder that does not load.
    """
    index = dict(source)
    for name, value in source.items():
        is_held = not isinstance(value, list) or (folder / name).is_dir()
        if not is_held and len(value) == 2 and value[0] is not None:
            index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    return index


def _update(config: Path, values: Mapping[str, Any]) -> None:
    if values:
        save_text(config, _dump({**read_json(config), **values}))


def _dump(values: Mapping[str, Any]) -> str:
    """Format JSON as Diffusers does."""
    return json.dumps(values, indent=2) + "\n"
