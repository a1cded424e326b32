"""Base model and adapters of an image to repeat, looked up on this machine by hash and name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dora_diffusion.cli.console.output import say
from dora_diffusion.cli.settings import adapter_and_strengths
from dora_diffusion.config.config_file import read_config_file
from dora_diffusion.config.families import UnsupportedModelError
from dora_diffusion.config.fields import require
from dora_diffusion.config.wording import did_you_mean, listing, number_text
from dora_diffusion.formats.checkpoint.models import detect_checkpoint_family
from dora_diffusion.formats.files.runs import adapter_files, pipeline_in, runs_folder
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.formats.parameters import tag_name
from dora_diffusion.models.locate import is_embedded, looks_local
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.images import (
    MODEL_HASH,
    RecordedAdapter,
    adapter_name,
    model_hash,
    model_name,
    read_fields,
)

_MODELS = ("*", "*/*")


def base_and_adapters(
    image: str, given: Mapping[str, Any], adapters: Sequence[RecordedAdapter]
) -> dict[str, Any]:
    """Return the settings ``base`` and ``adapter`` for an image; what is not given is looked up.

    Args:
        image: The image's file.
        given: Settings that take precedence.
        adapters: The image's adapters.

    Raises:
        ConfigError: If something is neither given nor found, all in one message.
    """
    name, folders = Path(image).name, search_folders(image, given.get("adapter_dir"))
    adapters = [] if given.get("adapters_file") else adapters
    words = given.get("adapter") or []
    words = [str(word) for word in ([words] if isinstance(words, str) else words)]
    chosen, spare = match_adapters(words, adapters)
    lacking = [at for at, word in enumerate(chosen) if not word]
    files = [file for folder in folders for file in adapter_files(folder)] if lacking else []
    found = {at: str(find_adapter(adapters[at], files) or "") for at in lacking}
    for at, file in found.items():
        chosen[at] = file or (spare.pop(0) if spare else "")
    base = given.get("base")
    if base is None:
        paths = [Path(adapter_and_strengths(word)[0]) for word in chosen if word]
        base = find_base(read_fields(image), paths, folders)
    lost = [adapter for adapter, word in zip(adapters, chosen, strict=True) if not word]
    _require_found(image, base is None, lost, folders, files)
    require(
        len(words) >= len(adapters) or not spare,
        f"{', '.join(spare)} is none of the adapters of {name} ({_names(adapters)}); leave it out, "
        "or give all of them with --adapter",
        "adapter",
    )
    looked_up = [str(base)] * ("base" not in given) + list(filter(None, found.values()))
    if looked_up:
        say(f"found for {name}: {', '.join(dict.fromkeys(looked_up))}", sys.stderr)
    pairs = list(zip(chosen, adapters, strict=True))
    if "strength_schedule" in given and not lacking:
        # Schedules that are given are in the order of the adapters that are given.
        pairs.sort(key=lambda pair: words.index(pair[0]))
    complete = [*(_with_strengths(word, adapter) for word, adapter in pairs), *spare]
    return {"base": base} | ({"adapter": complete} if adapters else {})


def match_adapters(
    words: Sequence[str], adapters: Sequence[RecordedAdapter]
) -> tuple[list[str], list[str]]:
    """Assign given adapters to the adapters of an image: by hash, by name, then in order.

    The order counts only where there are as many. One that an image has twice may be given once.

    Returns:
        A word for each of the image's adapters, empty where there is none; and the other words.
    """
    paths = [adapter_and_strengths(word)[0] for word in words]
    free, chosen = list(range(len(words))), [""] * len(adapters)

    def assign(agrees: Any) -> None:
        for at, adapter in enumerate(adapters):
            place = next((n for n in free if agrees(adapter, paths[n])), None)
            if not chosen[at] and place is not None:
                chosen[at] = words[place]
                free.remove(place)

    assign(RecordedAdapter.matches)
    assign(lambda adapter, path: tag_name(adapter_name(path)) == adapter.name)
    if len(words) >= len(adapters):
        assign(lambda adapter, path: True)
    keys = [(adapter.name, adapter.hash) for adapter in adapters]
    known = {key: word for key, word in zip(keys, chosen, strict=True) if word}
    chosen = [word or known.get(key, "") for key, word in zip(keys, chosen, strict=True)]
    return chosen, [words[n] for n in free]


def _with_strengths(word: str, adapter: RecordedAdapter) -> str:
    """A given or found adapter with the strengths of the image's, unless it has its own."""
    shares = MergeStrengths.of(adapter.strengths)
    numbers = map(number_text, (shares.text_encoder_strength, shares.unet_strength))
    return ":".join([word, *numbers]) if adapter_and_strengths(word)[0] == word else word


def _names(adapters: Sequence[RecordedAdapter]) -> str:
    return ", ".join(dict.fromkeys(adapter.name for adapter in adapters))


def _require_found(
    image: str,
    lacks_base: bool,
    adapters: Sequence[RecordedAdapter],
    folders: Sequence[Path],
    files: Sequence[Path],
) -> None:
    """Require that the base and all adapters of an image were found.

    Raises:
        ConfigError: If one is missing; names all of them, with the flags to give.
    """
    lost, flags = [], []
    if lacks_base:
        model = read_fields(image).get("Model")
        lost.append(f"the model {model}" if model else "a model that it does not name")
        flags.append("the model with --base")
    if adapters:
        lost.append(f"the adapter{'s' * (len(adapters) > 1)} {_names(adapters)}")
        flags.append("each adapter's file with --adapter or a folder above it with --adapter_dir")
    others = [str(file) for adapter in adapters for file in _namesakes(adapter, files)]
    hint = f"; of that name, with another hash: {', '.join(others)}" if others else ""
    require(
        not lost,
        f"{Path(image).name} was made with {' and '.join(lost)}, not found in "
        f"{', '.join(map(str, folders))}{hint}; give {', and '.join(flags)}",
        "base" if lacks_base else "adapter",
    )


def adapter_folder(folder: str) -> Path:
    """The folder of adapters that prompts name.

    Raises:
        ConfigError: If it is none.
    """
    path = Path(folder).expanduser()
    require(
        path.is_dir(), f"adapter_dir {folder} is not a folder; give one of adapters", "adapter_dir"
    )
    return path


def adapter_named(folder: str, name: str) -> str:
    """The file of an adapter of a folder, by its name in texts.

    Raises:
        ConfigError: If there is none.
    """
    # Files directly in the folder come first, and are preferred.
    files = reversed(adapter_files(adapter_folder(folder)))
    known = {tag_name(adapter_name(file)): str(file) for file in files}
    require(
        name in known,
        f"adapter_dir {folder} has no adapter {name!r}{did_you_mean(name, known)}; there are "
        f"{listing(known, 8) or 'none'}",
        "adapter_dir",
    )
    return known[name]


def search_folders(image: str, adapter_dir: str | None) -> list[Path]:
    """Return the folders to search, in their order.

    These are the folder of adapters, the app's runs, the image's folder and the current one.

    Raises:
        ConfigError: If the folder of adapters is none.
    """
    listed = [runs_folder(), Path(image).expanduser().parent, Path()]
    if adapter_dir is not None:
        listed.insert(0, adapter_folder(adapter_dir))
    first: dict[Path, Path] = {}
    for folder in listed:
        first.setdefault(folder.resolve(), folder)
    return list(first.values())


def find_adapter(adapter: RecordedAdapter, files: Sequence[Path]) -> Path | None:
    """Return the first file with an adapter's hash; where none is stated, with its name."""
    namesakes = _namesakes(adapter, files)
    if not adapter.hash:
        return next(iter(namesakes), None)
    # They are hashed first: the others may be many.
    others = (file for file in files if file not in namesakes and _is_adapter(file))
    return next(filter(adapter.matches, chain(namesakes, others)), None)


def _namesakes(adapter: RecordedAdapter, files: Iterable[Path]) -> list[Path]:
    named = (file for file in files if tag_name(adapter_name(file)) == adapter.name)
    return [file for file in named if _is_adapter(file)]


def _is_adapter(file: Path) -> bool:
    """Return whether a tensor file may be an adapter: whole models take long to hash."""
    try:
        detect_checkpoint_family(read_header(file).specs)
    except UnsupportedModelError:
        return True
    except (ValueError, OSError):  # damaged
        return False
    return False


def find_base(
    fields: Mapping[str, str], adapters: Iterable[Path], folders: Iterable[Path]
) -> str | None:
    """Return the base model that an image's text names, or None.

    Embedded models and models of the hub are found by name. Others are looked up in the settings of
    the adapters' runs, then in folders; a file must have the stated hash, whatever its name.

    Args:
        fields: The text's fields.
        adapters: The image's adapters.
        folders: Folders to search.
    """
    name, digest = fields.get("Model", ""), fields.get(MODEL_HASH, "")
    if not digest and (is_embedded(name) or ("/" in name and not looks_local(name))):
        return name
    listed = [*_bases_of_runs(adapters)]
    listed += [p for folder in folders for pattern in _MODELS for p in sorted(folder.glob(pattern))]
    named = [path for path in listed if model_name(str(path)) == name]
    if not digest:
        return next((str(path) for path in named if _is_model(path)), None)
    files = (path for path in chain(named, listed) if path.is_file() and _is_model(path))
    return next((str(file) for file in files if model_hash(file) == digest), None)


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return pipeline_in(path) is not None
    return path.suffix == ".safetensors" and not _is_adapter(path)


def _bases_of_runs(adapters: Iterable[Path]) -> Iterator[Path]:
    """The base models that the runs of adapters state, where they are files or folders."""
    for file in adapters:
        for folder in (file, file.parent, file.parent.parent):
            try:
                config = read_config_file(str(folder / "config.yaml"))
                base = Path(str(config["pretrained_model_name_or_path"])).expanduser()
            except (ValueError, OSError, KeyError):
                continue
            yield from (path for path in (base, folder / base) if path.exists())
