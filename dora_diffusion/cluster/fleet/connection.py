"""The connection to a Ray cluster, or one of this machine's own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError
from dora_diffusion.system import is_private, short_folder

INSTALL_RAY = 'pip install "ray[serve]"'
_CONNECT_SECONDS = 10.0


def ray_library() -> Any:
    """The library.

    Raises:
        ConfigError: If it is not installed.
    """
    # Nothing is sent to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Ray is not installed; run {INSTALL_RAY}, or leave out --address to train one subject "
            "after another in this process",
            "address",
        ) from error
    return ray


def connect(address: str, object_store: int = 100 * 2**20) -> Callable[[], None]:
    """Connect to a cluster, or start one on this machine.

    Args:
        address: ``"local"``: a cluster of this machine's own, which ends with this process.
            ``"auto"``: the one that runs here. Else HOST:PORT or ray://HOST:PORT.
        object_store: Bytes that a cluster of this machine's own reserves for what is sent.

    Returns:
        What ends the connection; a connection that was there before stays.

    Raises:
        ConfigError: If Ray is not installed, nothing answers, or others can read Ray's token.
    """
    ray = ray_library()
    if ray.is_initialized():
        return lambda: None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with contextlib.ExitStack() as stack:
        if address == "local":
            options |= {"include_dashboard": False, "object_store_memory": object_store}
            options |= {"_temp_dir": stack.enter_context(_private_folder())}
            stack.enter_context(_for_this_user())
        elif address != "auto":
            _require_answer(address)
        _require_private_token()
        # Lost workers are reported here, in one line each.
        with contextlib.suppress(ImportError):
            from ray._private import worker

            worker.print_to_stdstream = lambda *_, **__: None
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Nothing narrower where a node does not start in time.
            raise ConfigError(_refusal(address, error), "address") from error
        stack.callback(ray.shutdown)
        return stack.pop_all().close


def _refusal(address: str, error: Exception) -> str:
    """Return why there is no connection, and what to do."""
    reason = " ".join(str(error).split())[:200]
    hint = ""
    # Ray shows its token to a cluster that is named by its address only if it is told to.
    if address not in ("local", "auto") and "RAY_AUTH_MODE" not in os.environ:
        hint = "; if the cluster was started where there is a token, set RAY_AUTH_MODE=token"
    return (
        f"cannot connect to Ray at address {address} ({reason}); start a cluster with `ray "
        f"start --head`, or give --address local{hint}"
    )


@contextlib.contextmanager
def _private_folder() -> Iterator[str]:
    """A folder for a cluster's sockets and logs. Ray's own has a name that others can take."""
    folder = short_folder()
    try:
        yield os.path.join(folder, "ray")  # Ray opens this one to all.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _for_this_user() -> Iterator[None]:
    """Make a cluster that starts listen on loopback, with a token that is in no file.

    Whoever reaches its ports with its token runs code as this user. Ray would listen on all
    addresses, and write the token into a file that all can read.
    """
    from ray._private import ray_constants

    # The same for all clusters of this process, which reads it once.
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # It has one machine, as on macOS and Windows.
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _require_private_token() -> None:
    """Check that the file of Ray's token is private to this user.

    Raises:
        ConfigError: If others can read or replace it.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" not in os.environ and path.is_file() and not is_private(path):
        raise ConfigError(
            f"others of this machine can read Ray's token in {path}, and run code as you with it; "
            f"run 'chmod 600 {path}' as its owner, and make a new token if others had an account"
        )


def _require_answer(address: str) -> None:
    """Check within seconds that anything listens, which Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"address {address} is not local, auto, HOST:PORT or ray://HOST:PORT", "address"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"nothing answers at address {address} ({error}); is the cluster up, and its port open "
            "to this machine?",
            "address",
        ) from error
