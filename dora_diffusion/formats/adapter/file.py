"""Reading of an adapter in any known key format, and atomic writing in a chosen one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.families import FAMILIES, guess_family
from dora_diffusion.formats.adapter.alpha import AlphaOfTraining, AssumedAlpha
from dora_diffusion.formats.adapter.decode import Decoder
from dora_diffusion.formats.adapter.embeddings import (
    EMBEDDINGS,
    Vectors,
    bundled,
    check_tokens,
    embedding_files,
    field_of,
    read_embeddings,
    take_bundled,
    tokens_beside,
    write_embeddings,
)
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    TRAINED_ALPHA,
    AdapterMetadata,
    describe,
    parse_metadata,
)
from dora_diffusion.formats.adapter.stored import StoredAdapter, StoredFile
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_shapes
from dora_diffusion.formats.files.atomic import atomic_file, save_text
from dora_diffusion.formats.files.stream import PICKLED, write_tensors
from dora_diffusion.formats.layouts import LAYOUTS
from dora_diffusion.formats.layouts.comfyui_pair import pair_files
from dora_diffusion.formats.layouts.dotted import (
    PEFT_CONFIG,
    PEFT_FILE,
    peft_component,
    peft_folders,
)
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    EncodedFile,
    WriteOptions,
    denoisers_of,
    layout_named,
    refuse_denoiser,
)
from dora_diffusion.formats.names.modules import UNetLayout, known_layout
from dora_diffusion.numerics.weights import LayerWeights


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: layers by canonical module name, metadata and tokens.

    Attributes:
        layers: The layers.
        metadata: Facts that are not in the tensors.
        notes: Repairs of the file, one line each.
        beside: Plain LoRA layers whose change is added to the change of ``layers``. Only an
            ai-toolkit DoRA has them, if `read_adapter` is called with ``sums``.
        tokens: Vectors of the trained tokens, ``(C,)`` or ``(n, C)`` for each text encoder, by
            token.
    """

    layers: dict[str, LayerWeights]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    notes: tuple[str, ...] = ()
    beside: dict[str, LayerWeights] = field(default_factory=dict)
    tokens: dict[str, Vectors] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Family from the file's metadata or else its shapes; ``""`` if unknown."""
        shapes = {name: layer.weight_shape for name, layer in self.layers.items()}
        return self.metadata.family or guess_family(shapes)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Notes on assumptions, which may be wrong."""
        return tuple(note for note in self.notes if isinstance(note, AssumedAlpha))

    @property
    def lacks_alpha(self) -> bool:
        """True if the layers do not state their alpha; a caller may give one."""
        return any(isinstance(note, (AssumedAlpha, AlphaOfTraining)) for note in self.notes)


def write_adapter(
    path: str | Path,
    adapter: AdapterFile,
    target: str = "diffusers",
    *,
    dtype: torch.dtype | None = None,
    unet_layout: UNetLayout | None = None,
    base: ModelWeights | None = None,
) -> Path:
    """Write an adapter, each file atomically. Tokens are written to separate files next to it.

    Kohya files also contain the tokens.

    Args:
        path: A ``.safetensors`` file, or a folder, in which files get the target's default names.
            The ``peft`` target always writes a folder, with one sub-folder per component, and
            ``comfyui_pair`` one with two files.
        adapter: The layers and metadata.
        target: Name of a layout that can be written, such as ``kohya``.
        dtype: Dtype of the low-rank factors (``dense``: the differences); None keeps it.
            Magnitudes are float32.
        unet_layout: Layout for kohya names of an SDXL UNet that differs from the released one.
            None uses the base's.
        base: The base model, for targets that depend on one (``comfyui`` with magnitudes on the
            output axis, and ``dense``).

    Returns:
        The written file, or the folder.

    Raises:
        AdapterFormatError: If the target cannot store the adapter; names an alternative.
        DiskFullError: If the disk fills up. An existing file is unchanged then.
    """
    path = Path(path)
    embeddings = embeddings_beside(path, adapter)
    if path.suffix in PICKLED:
        problem = "pickles are not written; use the suffix .safetensors"
        raise AdapterFormatError(f"{path.name}: {problem}")
    layout = _written_layout(target, adapter)
    file_name = layout.file_name
    if file_name is not None and path.suffix != ".safetensors":
        path = path / file_name
    elif file_name is None and path.suffix == ".safetensors":
        problem = f"leave .safetensors out of {path.name}"
        raise AdapterFormatError(f"the {target} target is a folder, not a file: {problem}")
    if base is not None:
        unet_layout = unet_layout or known_layout(module_shapes(base))
    layout.check(adapter.layers)
    tokens = bundled(adapter.tokens, FAMILIES.get(adapter.family))
    extra = {name: text for name, text in adapter.metadata.extra.items() if name != EMBEDDINGS}
    metadata = dataclasses.replace(adapter.metadata, extra=extra | field_of(embeddings.values()))
    title = path.name if file_name is None else path.stem
    options = WriteOptions(metadata, dtype, title, unet_layout, base, adapter.beside, tokens)
    files = layout.encode(adapter.layers, options)
    if file_name is None:
        _write_folder(path, files)
    else:
        _write_file(path, *files.values())
    write_embeddings(embeddings, adapter.tokens)
    return path


def _written_layout(target: str, adapter: AdapterFile) -> AdapterLayout:
    written = {name: conversion for name, conversion in LAYOUTS.items() if conversion}
    if target not in written:
        raise AdapterFormatError(f"unknown target {target!r}; there is {', '.join(written)}")
    if not adapter.layers:
        raise AdapterFormatError("the adapter has no layers; nothing was written")
    layers = adapter.layers
    refuse_denoiser(target, written[target].denoisers, denoisers_of(layers))
    if adapter.beside and target != "dense":
        raise AdapterFormatError(f"the {target} format cannot store the sum of a DoRA and a LoRA")
    return layout_named(target)


def embeddings_beside(path: Path, adapter: AdapterFile) -> dict[str, Path]:
    """Return the file of each of an adapter's tokens, as `write_adapter` names them."""
    folder = path.parent if path.suffix == ".safetensors" else path
    return embedding_files(folder, path.stem, adapter.tokens)


def _write_folder(folder: Path, files: Mapping[str, EncodedFile]) -> None:
    """Write all files of a folder under temporary names, and then rename them.

    Files of another adapter are removed: its text encoder would be read with the new UNet.
    """
    old = [path / name for path in peft_folders(folder) for name in (PEFT_CONFIG, PEFT_FILE)]
    old += pair_files(folder)
    with contextlib.ExitStack() as stack:
        for name, file in files.items():
            _write_file(stack.enter_context(atomic_file(folder / name)), file)
    for path in set(old) - {folder / name for name in files}:
        path.unlink(missing_ok=True)


def _write_file(path: Path, file: EncodedFile) -> None:
    if file.text is not None:
        save_text(path, file.text)
    else:
        specs = {key: spec for key, (spec, _) in file.tensors.items()}
        write_tensors(path, specs, lambda key: file.tensors[key][1](), file.metadata)


def read_adapter(
    path: str | Path | StoredAdapter,
    base: ModelWeights | None = None,
    *,
    alpha: float | None = None,
    sums: bool = False,
) -> AdapterFile:
    """Read an adapter file, an output folder that contains one, or a PEFT folder.

    Args:
        path: The file or folder; or a `StoredAdapter`, with headers already read.
        base: The model that the adapter is for. It resolves underscore names exactly, checks that
            every layer fits, and determines the axis of magnitudes with an ambiguous shape.
        alpha: Alpha of training, for a file that does not store it.
        sums: Read an ai-toolkit DoRA with alpha other than its rank as a DoRA with a LoRA in
            ``beside``. Otherwise it is refused.

    Raises:
        AdapterFormatError: If it is not an adapter, does not fit the model, or cannot be read
            without guessing.
        FileNotFoundError: If the path does not exist.
    """
    stored = path if isinstance(path, StoredAdapter) else StoredAdapter.open(path)
    try:
        return _decode(stored, Decoder(stored.layout, base, alpha, sums))
    except AdapterFormatError as error:
        if base is None:
            raise
        family = ""
        with contextlib.suppress(AdapterFormatError):
            family = _decode(stored, Decoder(stored.layout, sums=True)).family
        made_for = FAMILIES.get(family)
        used_on = base.family or FAMILIES.get(guess_family(module_shapes(base)))
        if made_for is None or used_on is None or made_for == used_on:
            raise
        raise AdapterFormatError(
            f"{stored.path.name}: this adapter was made for {made_for.title} ({made_for.name}), "
            f"the base is {used_on.title} ({used_on.name}): use it with a base model of its "
            "family, or train it again on this one"
        ) from error


def _decode(stored: StoredAdapter, decoder: Decoder) -> AdapterFile:
    adapters = []
    for file in stored.files:
        tensors = file.tensors()
        try:
            adapters.append(_decode_file(decoder, file, tensors))
        except AdapterFormatError as error:
            # Name the file, since the caller may read several.
            raise AdapterFormatError(f"{file.path.name}: {error}") from error
    first, *rest = adapters
    for part in rest:
        first.layers.update(part.layers)
        first.tokens.update(part.tokens)
    notes = dict.fromkeys(note for part in adapters for note in part.notes)
    return dataclasses.replace(first, notes=tuple(notes))


def _decode_file(decoder: Decoder, file: StoredFile, tensors: dict[str, Tensor]) -> AdapterFile:
    metadata, folder, component = file.metadata, file.path.parent, None
    tokens: dict[str, Vectors] = {**take_bundled(tensors)}
    is_bundled = bool(tokens)
    if file.config is not None:
        component = peft_component(list(tensors), folder.name, metadata.get(OWN + "component", ""))
        folder = folder.parent
        decoder = dataclasses.replace(decoder, sums=False)
    layers, beside, notes = decoder.layers(file, tensors, component)
    if not is_bundled:
        tokens |= read_embeddings(folder, metadata, notes)
    if not tokens and file.config is None:
        tokens |= tokens_beside(file.path, notes)
    check_tokens(tokens, decoder.shapes)
    parsed = _parsed(metadata, layers)
    if tokens and component is None:
        parsed = dataclasses.replace(parsed, trigger=parsed.trigger or " ".join(tokens))
    return AdapterFile(layers, parsed, tuple(notes), beside, tokens)


def _parsed(metadata: Mapping[str, str], layers: Mapping[str, LayerWeights]) -> AdapterMetadata:
    parsed, trained = parse_metadata(metadata), metadata.get(OWN + "alpha", "")
    # The alpha of an approximation is not the alpha of training.
    if not trained or OWN + "approximation" in metadata:
        return parsed
    if trained == describe({name: layer.alpha for name, layer in layers.items()}):
        return parsed
    # The scale was multiplied into the factors, so the layers no longer state the trained alpha.
    return dataclasses.replace(parsed, extra={**parsed.extra, TRAINED_ALPHA: trained})
