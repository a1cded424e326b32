"""Access of other users of the machine to a cluster: a token, a folder, ports."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from dora_diffusion.cluster.fleet.connection import connect
from dora_diffusion.config import ConfigError
from dora_diffusion.system import is_private
from tests.refusal import refused

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Arguments that Ray is started with, instead of Ray; a home folder without a token."""
    ray = pytest.importorskip("ray")
    from ray._private import ray_constants, services

    found = []

    def init(**options):
        address = services.resolve_ip_for_localhost("127.0.0.1")
        found.append((options, os.environ.get("RAY_AUTH_TOKEN"), address))

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "restored by monkeypatch")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda *_: "192.0.2.1")
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return found


def test_a_cluster_of_one_s_own_is_nobody_else_s(started, tmp_path):
    folders = []
    for _ in range(2):
        end = connect("local")
        options, token, address = started[-1]
        folders.append(Path(options["_temp_dir"]).parent)
        assert stat.S_IMODE(folders[-1].stat().st_mode) == 0o700
        assert len(str(folders[-1])) < 20
        assert address == "127.0.0.1"
        (folders[-1] / "ray").mkdir()
        end()
        assert not folders[-1].exists()
    assert len({*folders}) == 2
    (token,) = {token for _, token, _ in started}  # A process reads it once.
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert not list(tmp_path.iterdir())
    connect("auto")()
    options, _, address = started[-1]
    assert "_temp_dir" not in options
    assert address == "192.0.2.1"


@pytest.mark.parametrize("error", [OSError, Exception])
def test_where_nothing_starts_nothing_is_left(started, monkeypatch, error):
    import ray

    made, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **o: made.append(make(**o)) or made[-1])
    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=error("The current node timed out")))
    with refused("address", "local (The current node timed out"):
        connect("local")
    assert made
    assert not Path(made[0]).exists()


@pytest.mark.parametrize("is_default", [True, False])
def test_a_token_that_others_can_read_is_refused(started, tmp_path, monkeypatch, is_default):
    """Of every cluster that would read it."""
    file = tmp_path / ".ray" / "auth_token"
    if not is_default:
        file = tmp_path / "token"
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    file.parent.mkdir(exist_ok=True)
    file.write_text("t" * 64, encoding="utf-8")
    addresses = ("auto",) if is_default else ("auto", "local")
    for mode in (0o644, 0o640, 0o604, 0o660, 0o602):
        file.chmod(mode)
        for address in addresses:
            with pytest.raises(ConfigError, match=rf"can read Ray's token in {file}, and run code"):
                connect(address)
    file.chmod(0o600)
    for address in addresses:
        connect(address)()
    assert len(started) == len(addresses)
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)  # The file is not read then.
    connect("auto")()


def test_what_is_another_user_s_is_not_private(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch(0o600)
    assert is_private(file)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert not is_private(file)
