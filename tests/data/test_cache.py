"""The tensor cache: keyed by content, on disk atomically."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_diffusion.data.cache import TensorCache


def test_entries_are_computed_once_and_survive_a_restart(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append("call")
        return {"mean": torch.arange(6.0).view(2, 3).T, "half": torch.ones(2, dtype=torch.bfloat16)}

    cache = TensorCache("vae", folder=tmp_path)
    key = cache.key("photo", "crop")
    assert key not in cache
    first = cache.get_or_compute(key, compute)
    again = TensorCache("vae", folder=tmp_path).get_or_compute(key, compute)
    assert calls == ["call"]
    assert key in TensorCache("vae", folder=tmp_path)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype


def test_keys_tell_contents_and_models_apart() -> None:
    cache = TensorCache("vae")
    keys = {cache.key("ab", "c"), cache.key("a", "bc"), cache.key("abc"), cache.key("ab", "c", "")}
    assert len(keys) == 4
    assert TensorCache("other").key("ab", "c") not in keys
    assert TensorCache("vae").key("ab", "c") in keys


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    cache = TensorCache("vae", folder=tmp_path, in_memory=False)
    key = cache.key("photo")
    cache.put(key, {"value": torch.ones(3)})
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert cache.get(key) is None
    assert torch.equal(
        cache.get_or_compute(key, lambda: {"value": torch.zeros(3)})["value"], torch.zeros(3)
    )
    assert torch.equal(cache.get(key)["value"], torch.zeros(3))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache("vae", folder=tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.put(cache.key("photo"), {"value": torch.ones(3)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_stored_tensors_are_detached_copies() -> None:
    cache = TensorCache("vae")
    source = torch.ones(3, requires_grad=True)
    cache.put("key", {"value": source})
    with torch.no_grad():
        source.fill_(7.0)
    stored = cache.get("key")["value"]
    assert torch.equal(stored, torch.ones(3))
    assert not stored.requires_grad
    cache.clear_memory()
    assert cache.get("key") is None
