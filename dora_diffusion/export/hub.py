"""Publishing a run on the Hugging Face hub: private unless asked otherwise."""

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
    """Error of publishing; one line with what to do."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = True,
    adapter: Path | None = None,
    card: str | None = None,
) -> str:
    """Upload a run's adapter, model card, settings, loss and samples, in one commit.

    The photos stay here, and so do the names of this computer's folders. The token is the hub
    library's own: ``HF_TOKEN``, or what ``hf auth login`` has kept. ``HF_ENDPOINT`` and
    ``HF_HUB_OFFLINE`` are honoured.

    Args:
        folder: A run's output folder.
        repository: ``NAME/MODEL``; it is made where there is none.
        private: Only you can see it.
        adapter: Another adapter file than the folder's, such as a checkpoint's.
        card: Another README than the folder's.

    Returns:
        The address of the repository.

    Raises:
        HubError: If it cannot be published, or would be seen by others against ``private``.
        FileNotFoundError, AdapterFormatError: If the folder holds no adapter.
    """
    check(repository)
    files = _files(Path(folder), adapter, card)
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()
    ]
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        if private and not api.repo_info(repository).private:
            raise HubError(
                f"{repository} exists, and everybody can see it; choose another name, or publish "
                "it on purpose"
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
    """Check that a push could begin.

    Raises:
        HubError: If the name is none, the hub is switched off, or there is no token.
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
        raise HubError("there is no token; set HF_TOKEN to one that may write, and start again")


def _files(folder: Path, adapter: Path | None, card: str | None) -> dict[str, Path | bytes]:
    """Path in the repository -> what to upload."""
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
    if "config.yaml" in files:  # without this computer's folders
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        values = resolve_paths(values, folder)
        text: str = yaml.safe_dump(without_paths(values), sort_keys=False, allow_unicode=True)
        files["config.yaml"] = text.encode("utf-8")
    others = [*sorted(folder.glob("samples/*.png")), *embeddings_of(file)]
    return files | {f"{path.parent.name}/{path.name}": path for path in others if path.is_file()}


def _reason(error: Any) -> str:
    """Return the hub's message in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
    if status in (401, 403):
        return f"{message} (does the token in HF_TOKEN belong to that name, and may it write?)"
    return str(message)
