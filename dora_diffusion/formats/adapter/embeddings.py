"""Tokens that were trained with an adapter, in textual-inversion files or bundled in its file.

A textual-inversion file contains one token. For one text encoder the tensor is ``emb_params``,
which InvokeAI requires for a token of several vectors; for SDXL's two encoders the tensors are
``clip_l`` and ``clip_g``. A1111, ComfyUI and InvokeAI name the token after the file.

A kohya file bundles ``bundle_emb.TOKEN.clip_l`` and ``bundle_emb.TOKEN.clip_g``, which OneTrainer
writes and A1111 and OneTrainer read. For Stable Diffusion 2 the key is
``bundle_emb.TOKEN.clip_h``, which ComfyUI looks up if such a file is used as an embedding.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.families import Family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.adapter.stored import PIVOTAL, StoredFile
from dora_diffusion.formats.files.stream import PICKLED, read_header, save_tensors
from dora_diffusion.formats.layouts import FACTS
from dora_diffusion.formats.layouts.dotted import DIFFUSERS
from dora_diffusion.formats.layouts.layout import BUNDLED_TOKEN, AdapterFormatError, Note

# Folder of such files in A1111 and ComfyUI, and the metadata field that lists them.
EMBEDDINGS = "embeddings"
# The module whose input width is the width of a token's vector.
_READS_TOKENS = "{}.text_model.encoder.layers.0.self_attn.q_proj"
_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_ALONE = "emb_params"
COMPONENTS = {key: component for component, key in _KEYS.items()} | {
    "clip_h": "text_encoder", _ALONE: "text_encoder"
}  # fmt: skip
_EMBEDDING = re.compile(r"(?:^|[_.-])(?:learned_)?(?:emb|embeds|embeddings?)(?=[_.-]|\d|$)")
# Default file names of formats, as in a run's folder, which do not identify an adapter.
_DEFAULT_STEMS = ("pytorch_lora_weights", "adapter_kohya", "dora_kohya", "dora_diffusion_model")

Vectors = Mapping[str, Tensor]
"""A token's vectors ``(C,)``, or ``(n, C)``, by text encoder."""


class MissingToken(Note):
    """Note that the file of a trained token is missing."""


class UnreadFile(Note):
    """Note on a file next to an adapter that seems to belong to it, but is not read."""


def embedding_files(folder: Path, stem: str, tokens: Collection[str]) -> dict[str, Path]:
    """Return the file of each token.

    Args:
        folder: Folder of the adapter or model. The files are in its sub-folder `EMBEDDINGS`.
        stem: Start of the files' names. The default name of an adapter's file is omitted.
        tokens: The tokens, such as ``<s1>``.
    """
    files: dict[str, Path] = {}
    # ComfyUI ends embedding:NAME at a space, and treats brackets, colons and commas as syntax.
    start = "" if stem in ("", *_DEFAULT_STEMS) else re.sub(r"[^\w.-]+", "_", stem) + "_"
    for number, token in enumerate(tokens, 1):
        word = re.sub(r"\W+", "", token) or str(number)
        file = folder / EMBEDDINGS / f"{start}{word}.safetensors"
        if file in files.values():
            file = file.with_stem(f"{file.stem}_{number}")
        files[token] = file
    return files


def write_embeddings(files: Mapping[str, Path], tokens: Mapping[str, Vectors]) -> None:
    """Write each token's vectors to its file, in their precision."""
    for token, file in files.items():
        named = {_KEYS[name]: _rows(vectors) for name, vectors in tokens[token].items()}
        if list(tokens[token]) == ["text_encoder"]:
            named = {_ALONE: named["clip_l"]}
        save_tensors(file, named, {"format": "pt", OWN + "token": token})


def _rows(vectors: Tensor) -> Tensor:
    return vectors.view(-1, vectors.shape[-1])


def read_embedding(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return the vectors in a textual-inversion file by token.

    If the file does not name its token, the file's name is the token.

    Raises:
        AdapterFormatError: If the file is damaged.
    """
    stored = StoredFile(file)
    own_token = stored.metadata.get(OWN + "token", file.stem)
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors().items():
        vectors = tokens.setdefault(own_token if key in COMPONENTS else key, {})
        vectors[COMPONENTS.get(key, "text_encoder")] = tensor
    return tokens


def read_tokens(model: Path) -> dict[str, Vectors]:
    """Return the tokens in files that this program wrote into a model's folder or next to its file.

    Warns:
        UserWarning: If a file that the model's file lists is missing.
    """
    tokens: dict[str, Vectors] = {}
    if model.is_file():
        notes: list[str] = []
        tokens |= read_embeddings(model.parent, read_header(model).metadata, notes)
        for note in notes:
            warnings.warn(f"{model.name}: {note}", stacklevel=3)
    for file in sorted((model / EMBEDDINGS).glob("*.safetensors")):
        if OWN + "token" in StoredFile(file).metadata:
            tokens |= read_embedding(file)
    return tokens


def is_written(file: Path, token: str, vectors: Vectors) -> bool:
    """Return whether the file exists and contains exactly this token."""
    with contextlib.suppress(AdapterFormatError, OSError):
        return are_equal(read_embedding(file).get(token, {}), vectors)
    return False


def bundled(tokens: Mapping[str, Vectors], family: Family | None) -> dict[str, Tensor]:
    """Return the tensors of tokens, by their keys in a kohya file of a family."""
    encoders = family.text_encoders if family else ()
    keys = _KEYS | {encoder.component: encoder.embedding_key for encoder in encoders}
    return {
        f"bundle_emb.{token}.{keys[component]}": _rows(tensor)
        for token, vectors in tokens.items()
        for component, tensor in vectors.items()
    }


def take_bundled(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Pop the tokens from a file's tensors, by token."""
    tokens: dict[str, dict[str, Tensor]] = {}
    for match in filter(None, map(BUNDLED_TOKEN.fullmatch, list(tensors))):
        component = COMPONENTS[match["key"]]
        tokens.setdefault(match["token"], {})[component] = tensors.pop(match[0])
    return tokens


def are_equal(a: Vectors, b: Vectors) -> bool:
    """Return whether two tokens have the same vectors."""
    return a.keys() == b.keys() and all(
        torch.equal(_rows(tensor), _rows(b[name])) for name, tensor in a.items()
    )


def field_of(files: Iterable[Path]) -> dict[str, str]:
    """Return the metadata field that lists the files of tokens; {} without files."""
    names = [file.name for file in files]
    return {EMBEDDINGS: json.dumps(names, ensure_ascii=False)} if names else {}


def embeddings_of(adapter: Path) -> list[Path]:
    """Return the files of an adapter's tokens, existing or not; none if it cannot be read."""
    with contextlib.suppress(AdapterFormatError, OSError):
        return _named(adapter.parent, StoredFile(adapter).metadata)
    return []


def _named(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
    try:
        names = list(json.loads(metadata.get(OWN + EMBEDDINGS, "[]")))
    except (ValueError, TypeError, RecursionError):
        return []
    # Other names were not written by this program.
    known = (n for n in names if isinstance(n, str) and re.fullmatch(r"[^/\\]+\.safetensors", n))
    return [folder / EMBEDDINGS / name for name in known]


def read_embeddings(
    folder: Path, metadata: Mapping[str, str], notes: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the tokens in the files that an adapter's metadata lists.

    Args:
        folder: Folder of the adapter.
        metadata: Metadata of the adapter.
        notes: List to which a line for each missing file is appended.

    Raises:
        AdapterFormatError: If a file is damaged.
    """
    tokens: dict[str, dict[str, Tensor]] = {}
    for file in _named(folder, metadata):
        if file.is_file():
            tokens |= read_embedding(file)
        else:
            missing = f"its trained token's file {EMBEDDINGS}/{file.name} is not next to it"
            notes.append(MissingToken(f"{missing}, so the token has no effect in prompts"))
    return tokens


def tokens_beside(adapter: Path, notes: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tokens that Diffusers' advanced scripts have written next to an adapter.

    Row n of ``clip_l``, and of SDXL's ``clip_g``, is the vector of the token ``<sn>``.

    Args:
        adapter: An adapter file that contains no tokens.
        notes: List to which a line on unread files is appended.

    Raises:
        AdapterFormatError: If the tokens' file is damaged.
    """
    folder = adapter.parent
    files = [*folder.iterdir(), *folder.glob(f"{EMBEDDINGS}/*")]
    files = sorted(file for file in files if _belongs(file, adapter))
    read = _pivotal_file(adapter, files)
    if unread := [file.relative_to(folder).as_posix() for file in files if file != read]:
        notes.append(UnreadFile(f"next to it and not read: {listing(unread, 5)}"))
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, rows in StoredFile(read).tensors().items() if read else ():
        for number, row in enumerate(rows.view(-1, rows.shape[-1])):
            tokens.setdefault(f"<s{number}>", {})[COMPONENTS[key]] = row
    return tokens


def _belongs(file: Path, adapter: Path) -> bool:
    """Return whether a file has the adapter's name, or is an embedding for the adapter."""
    if file.suffix not in (".safetensors", *PICKLED) or file == adapter:
        return False
    rest = file.stem.removeprefix(adapter.stem)
    # An adapter with its format's default name has a separate folder.
    if adapter.name == DIFFUSERS.file_name:
        is_embedding = file.parent.name == EMBEDDINGS or _EMBEDDING.search(file.stem) is not None
    else:
        is_embedding = rest != file.stem and _EMBEDDING.match(rest) is not None
    return not rest or is_embedding or file.stem.startswith("learned_embeds")


def _pivotal_file(adapter: Path, files: list[Path]) -> Path | None:
    """Return the scripts' file of tokens: named after adapter or folder, or the only one."""
    known = [f for f in files if f.stem.endswith(PIVOTAL) and f.suffix == ".safetensors"]
    known = [f for f in known if StoredFile(f).specs.keys() <= {"clip_l", "clip_g"}]
    names = [adapter.stem, adapter.absolute().parent.name]
    named = [file for name in names for file in known if file.stem == name + PIVOTAL]
    only = known if len(known) == 1 and adapter.name == DIFFUSERS.file_name else []
    return next(iter(named or only), None)


def check_tokens(
    tokens: Mapping[str, Vectors], shapes: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Check that tokens are finite vectors of the model's width.

    Args:
        tokens: The vectors by token.
        shapes: Shapes of the model's modules; None if unknown.

    Raises:
        AdapterFormatError: If a token is damaged or has another width.
    """
    entries = ((t, *item) for t, vectors in tokens.items() for item in vectors.items())
    for token, component, tensor in entries:
        is_vector = tensor.is_floating_point() and tensor.ndim in (1, 2) and tensor.numel()
        if not is_vector or not torch.isfinite(tensor).all():
            raise AdapterFormatError(
                f"its token {token} is not a vector of finite numbers; the file is damaged"
            )
        width = (shapes or {}).get(_READS_TOKENS.format(component), tensor.shape)[-1]
        if tensor.shape[-1] != width:
            raise AdapterFormatError(
                f"its token {token} was made for another model: it has {tensor.shape[-1]} numbers, "
                f"but this text encoder reads {width}"
            )


def embedding_notes(written: Path, files: Mapping[str, Path], program: str = "") -> list[str]:
    """Return notes on loading the trained tokens of an adapter or model; none without tokens.

    Args:
        written: The written adapter or model.
        files: The files of its tokens, by token.
        program: The program that it was written for, or empty.
    """
    if not files:
        return []
    uses = FACTS["trained_words"]
    ways = [uses[program]] if program in uses else dict.fromkeys(uses.values())
    keys = read_header(written).specs if written.is_file() else ()
    is_bundled = any(map(BUNDLED_TOKEN.fullmatch, keys))
    names = [f"{token} in {EMBEDDINGS}/{file.name}" for token, file in files.items()]
    is_read = is_bundled and program in ("", "a1111", "civitai")
    where = "in the file, for A1111, and in" if is_read else "also in" if is_bundled else "in"
    return [
        f"its trained words are {where} separate files: {listing(names, 8)}",
        f"to use a word, {'; '.join(ways)}",
        *(bundled_notes(files) if is_read else ()),
    ]


def bundled_notes(tokens: Iterable[str]) -> list[str]:
    """Return notes on tokens bundled in a file; none if every program finds them."""
    # CLIP's tokenizer joins adjacent punctuation into one token.
    return [
        f"A1111 finds {token} in the file only if no other punctuation is next to it: write "
        f"'{token} ,' for '{token},'"
        for token in tokens
        if re.search(r"^\W|\W$", token)
    ]
