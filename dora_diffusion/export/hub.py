"""Publishing of a run on the Hugging Face hub, by default as a private repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_diffusion.config.file import resolve_paths
from dora_diffusion.export.files import ExportError
from dora_diffusion.formats.adapter.embeddings import embeddings_of
from dora_diffusion.formats.adapter.metadata import without_paths
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.models.locate import is_network_error, is_offline


class HubError(ExportError):
    """Error of publishing, with a one-line message and the fix."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = True,
    adapter: Path | None = None,
    card: str | None = None,
) -> str:
    """Upload a run's adapter, model card, settings, loss and samples, in one commit.

    Photos and names of local folders are not uploaded. The token is that of the hub library:
    ``HF_TOKEN``, or the one stored by ``hf auth login``. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are
    honoured.

    Args:
        folder: A run's output folder.
        repository: ``NAME/MODEL``. It is created if it does not exist.
        private: Make the repository private.
        adapter: Adapter file to upload in place of the folder's, such as a checkpoint's.
        card: README in place of the folder's.

    Returns:
        The address of the repository.

    Raises:
        HubError: If it cannot be published, or the repository is public despite ``private``.
        FileNotFoundError, AdapterFormatError: If the folder contains no adapter.
    """
    check(repository)
    files = _files(Path(folder), adapter, card)
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    operations = [huggingface_hub.CommitOperationAdd(*item) for item in files.items()]
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        if private and not api.repo_info(repository).private:
            raise HubError(
                f"{repository} exists and is public; choose another name, or allow a public one"
            )
        api.create_commit(repository, operations, commit_message="Upload DoRA adapter")
    except errors.HfHubHTTPError as error:
        raise HubError(f"the hub refused {repository}: {_reason(error)}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise HubError(f"the hub could not be reached: {error}") from error
    return address


def check(repository: str) -> None:
    """Check the name, the connection settings and the token before a push.

    Raises:
        HubError: If the name is not valid, HF_HUB_OFFLINE is set, or no token is found.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    is_name = repository.count("/") == 1 and repository == repository.strip()
    try:
        validate_repo_id(repository)
    except HFValidationError:
        is_name = False
    if not is_name:
        raise HubError(f"{repository!r} is not a name on the hub; write NAME/MODEL")
    if is_offline():
        raise HubError("HF_HUB_OFFLINE is set, so nothing is sent to the hub; unset it to publish")
    if huggingface_hub.get_token() is None:
        raise HubError("no token is set; set HF_TOKEN to one with write access, and start again")


def _files(folder: Path, adapter: Path | None, card: str | None) -> dict[str, Path | bytes]:
    """Return the files to upload, by path in the repository."""
    import yaml

    file = adapter or find_adapter(folder)
    if file.is_dir():
        raise HubError(f"{file} is in PEFT's layout; publish the run that made it")
    files: dict[str, Path | bytes] = {file.name: file}
    for name in ("README.md", "config.yaml", "metrics.jsonl", "run.json"):
        if (folder / name).is_file():
            files[name] = folder / name
    if card is not None:
        files["README.md"] = card.encode("utf-8")
    if "config.yaml" in files:  # Leave out local folders.
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        values = resolve_paths(values, folder)
        text: str = yaml.safe_dump(without_paths(values), sort_keys=False, allow_unicode=True)
        files["config.yaml"] = text.encode("utf-8")
    extra_files = [*sorted(folder.glob("samples/*.png")), *embeddings_of(file)]
    return files | {f"{f.parent.name}/{f.name}": f for f in extra_files if f.is_file()}


def _reason(error: Any) -> str:
    """Return the hub's message in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
    if status in (401, 403):
        return f"{message} (does the token in HF_TOKEN belong to that name, with write access?)"
    return str(message)
