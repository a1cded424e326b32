"""A cache of tensors keyed by content: never by position, so that no shuffle can mix entries."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

Tensors = Mapping[str, Tensor]


class TensorCache:
    """Named tensors under a digest of everything that determines them."""

    def __init__(
        self, identity: str, *, folder: str | Path | None = None, in_memory: bool = True
    ) -> None:
        """Create an empty cache, or open one on disk.

        Args:
            identity: What computes the tensors, such as a digest of the model's weights. Another
                identity never sees these entries.
            folder: Keep entries on disk too, one safetensors file each, written atomically.
            in_memory: Keep entries in memory, on the CPU.
        """
        self.identity = identity
        self.folder = None if folder is None else Path(folder)
        self.in_memory = in_memory
        self._entries: dict[str, dict[str, Tensor]] = {}

    def key(self, *parts: str) -> str:
        """Digest of the identity and the parts, such as a photo's digest and its crop's key."""
        digest = hashlib.sha256()
        for part in (self.identity, *parts):
            # The length goes first, so that ("ab", "c") and ("a", "bc") differ.
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key, or None. Treat them as read-only."""
        if key in self._entries:
            return self._entries[key]
        found = self._read(key)
        if found is not None and self.in_memory:
            self._entries[key] = found
        return found

    def put(self, key: str, tensors: Tensors) -> None:
        """Store tensors under a key, detached and on the CPU."""
        stored = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        if self.in_memory:
            self._entries[key] = stored
        if self.folder is not None:
            self._write(key, stored)

    def get_or_compute(self, key: str, compute: Callable[[], Tensors]) -> dict[str, Tensor]:
        """The tensors under a key, computed and stored at the first call."""
        found = self.get(key)
        if found is not None:
            return found
        tensors = {name: tensor.detach().cpu() for name, tensor in compute().items()}
        self.put(key, tensors)
        return tensors

    def __contains__(self, key: str) -> bool:
        """Whether a key is stored."""
        return key in self._entries or (self.folder is not None and self._path(key).is_file())

    def clear_memory(self) -> None:
        """Forget what is in memory; files stay."""
        self._entries.clear()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        """Read a file; a damaged one counts as absent and will be written again."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None:
            return None
        try:
            return dict(load_file(self._path(key)))
        except (OSError, SafetensorError):
            return None

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write under a temporary name, then rename: readers see whole files only."""
        from safetensors.torch import save_file

        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(descriptor)
        try:
            save_file(tensors, temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
