"""The connection to a Ray cluster, or one of this machine's own."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from dora_diffusion.config import ConfigError

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
            "after another in this process"
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
        ConfigError: If Ray is not installed, or nothing answers.
    """
    ray = ray_library()
    if ray.is_initialized():
        return lambda: None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": object_store}
    elif address != "auto":
        _require_answer(address)
    _keep_quiet()
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = ""
        # Ray shows its token to a cluster that is named by its address only if it is told to.
        if address not in ("local", "auto") and "RAY_AUTH_MODE" not in os.environ:
            hint = "; if the cluster was started where there is a token, set RAY_AUTH_MODE=token"
        raise ConfigError(
            f"cannot connect to Ray at address {address} ({reason}); start a cluster with `ray "
            f"start --head`, or give --address local{hint}"
        ) from error
    done: Callable[[], None] = ray.shutdown
    return done


def _require_answer(address: str) -> None:
    """See within seconds whether anything listens, which Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"address {address} is not local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"nothing answers at address {address} ({error}); is the cluster up, and its port open "
            "to this machine?"
        ) from error


def _keep_quiet() -> None:
    """Have Ray print nothing of lost workers, which are told of here, in one line each."""
    with contextlib.suppress(ImportError):
        from ray._private import worker

        worker.print_to_stdstream = lambda *_, **__: None
