"""Connection to a Ray cluster, or start of a local one, and the share of each worker."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError
from dora_diffusion.config.command import CommandSettings, group
from dora_diffusion.config.fields import flag, when
from dora_diffusion.system import is_private, short_folder

INSTALL_RAY = 'pip install "ray[serve]"'
_CONNECT_SECONDS = 10.0
_RAY = when(
    lambda config: config.address is not None,
    "no address is given: there is one worker, this process",
)


@dataclass(frozen=True, kw_only=True)
class Share(CommandSettings):
    """Share of a node for each worker."""

    workers: int | None = flag(
        None,
        "Most workers at once. Default: as many as the nodes have room for.",
        least=1,
        needs=(_RAY,),
    )
    num_cpus: float = flag(1.0, "Processors of each worker.", least=0, needs=(_RAY,))
    num_gpus: float | None = flag(
        None,
        "GPUs of each worker; 0.5 has two share one. Default: 1 where the cluster has GPUs.",
        least=0,
        needs=(_RAY,),
    )


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommandSettings):
    """Settings of the workers of a large task."""

    address: str | None = flag(
        None,
        "Ray cluster: local (workers on this machine), auto (the cluster that runs here), "
        "HOST:PORT or ray://HOST:PORT. Default: no Ray, one after another in this process.",
    )
    share: Share = group(Share)


def ray_library() -> Any:
    """Import Ray.

    Raises:
        ConfigError: If Ray is not installed.
    """
    # No usage statistics are sent.
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
        address: ``"local"`` for a new cluster on this machine that ends with this process,
            ``"auto"`` for the running cluster, or HOST:PORT or ray://HOST:PORT.
        object_store: Size in bytes of a local cluster's object store.

    Returns:
        Function that closes the connection; it does nothing if Ray was already connected.

    Raises:
        ConfigError: If Ray is not installed, the address does not answer, or other users can read
            Ray's token.
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
        # Suppress Ray's output: this package reports lost workers itself, in one line each.
        with contextlib.suppress(ImportError):
            from ray._private import worker

            worker.print_to_stdstream = lambda *_, **__: None
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray raises a plain Exception if a node starts too slowly.
            raise ConfigError(_refusal(address, error), "address") from error
        stack.callback(ray.shutdown)
        return stack.pop_all().close


def _refusal(address: str, error: Exception) -> str:
    """Return the reason for a failed connection, and the fix."""
    reason = " ".join(str(error).split())[:200]
    hint = ""
    # Ray sends its token to a cluster at an address only if RAY_AUTH_MODE is set.
    if address not in ("local", "auto") and "RAY_AUTH_MODE" not in os.environ:
        hint = "; if the cluster was started where there is a token, set RAY_AUTH_MODE=token"
    return (
        f"cannot connect to Ray at address {address} ({reason}); start a cluster with `ray "
        f"start --head`, or give --address local{hint}"
    )


@contextlib.contextmanager
def _private_folder() -> Iterator[str]:
    """Create a private folder for a cluster's sockets and logs; Ray's default name is guessable."""
    folder = short_folder()
    try:
        yield os.path.join(folder, "ray")  # Ray makes this one accessible to all users.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _for_this_user() -> Iterator[None]:
    """Make a new cluster listen on loopback, with a token that is not written to a file.

    A client with the token can run code as this user. By default, Ray listens on all addresses and
    writes the token to a file that all users can read.
    """
    from ray._private import ray_constants

    # One token for all clusters of this process, because Ray reads it only once.
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # A single machine, as on macOS and Windows.
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _require_private_token() -> None:
    """Check that the file of Ray's token is private to this user.

    Raises:
        ConfigError: If other users can read or replace it.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" not in os.environ and path.is_file() and not is_private(path):
        raise ConfigError(
            f"others of this machine can read Ray's token in {path}, and run code as you with it; "
            f"run 'chmod 600 {path}' as its owner, and make a new token if others had an account"
        )


def _require_answer(address: str) -> None:
    """Check within seconds that the address answers; Ray itself would retry for minutes."""
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
