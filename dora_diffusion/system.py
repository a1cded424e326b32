"""Differences of operating systems: the only module that uses features of POSIX alone.

All other modules only use features that Windows, Linux and macOS share.
"""

from __future__ import annotations

import errno
import getpass
import ipaddress
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

# Sent by a closing terminal; not on Windows.
HANGUP: int | None = getattr(signal, "SIGHUP", None)
# Ctrl-Break or a closing console on Windows; not on other systems.
BREAK: int | None = getattr(signal, "SIGBREAK", None)
# Keys of the user at the terminal.
INTERRUPTS = tuple(number for number in (signal.SIGINT, BREAK) if number is not None)
STOP_SIGNALS = tuple(n for n in (*INTERRUPTS, signal.SIGTERM, HANGUP) if n is not None)

# Windows errors for a file in use by another program: access denied, sharing violation.
_IN_USE = (5, 32)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def is_windows() -> bool:
    return os.name == "nt"


def let_break_interrupt() -> None:
    """Make Ctrl-Break raise `KeyboardInterrupt`, as Ctrl-C does."""
    if BREAK is not None and threading.current_thread() is threading.main_thread():
        signal.signal(BREAK, signal.default_int_handler)


def detached() -> dict[str, Any]:
    """Keyword arguments of `subprocess.Popen` for a process that outlives this one."""
    if hasattr(os, "setsid"):
        return {"start_new_session": True}
    # Without a visible console, and without Ctrl-C of this process.
    names = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
    return {"creationflags": sum(getattr(subprocess, name, 0) for name in names)}


def peak_memory() -> float:
    """Return the peak memory of this process in GiB; current memory if no peak is available."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 2**30
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def private_folder(name: str) -> Path:
    """Return a private folder for temporary files, the same one in each call.

    Args:
        name: Purpose of the folder, part of its name.

    Raises:
        OSError: If the path is a link, belongs to another user, or is open to others.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    path = Path(tempfile.gettempdir(), f"dora-diffusion-{user}-{name}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or not path.is_dir() or not is_private(path):
        problem = "is a link, another user's or open to others; remove it, or set TMPDIR elsewhere"
        raise PermissionError(errno.EACCES, problem, str(path))
    return path


def short_folder() -> str:
    """Make a private folder with a random name and a path short enough for sockets.

    Paths of sockets have at most about a hundred characters, and TMPDIR may use most of them, as on
    macOS.
    """
    return tempfile.mkdtemp(prefix="dora-", dir=None if is_windows() else "/tmp")


def drop_from_cache(handle: int) -> None:
    """Drop a written file from the system's cache, if the system supports it."""
    if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def is_in_use(error: OSError) -> bool:
    """Return whether Windows raised the error since another program has the file open."""
    return getattr(error, "winerror", None) in _IN_USE


def patiently(action: Callable[[], Result]) -> Result:
    """Run an action on a file, with retries while another process has the file open.

    Windows does not allow programs to rename, replace or remove an open file, or to open a file
    that is being replaced. Virus scanners and readers hold files for milliseconds, so the action is
    retried for about 1.5 seconds.

    Raises:
        OSError: If the file is still in use, or at once for other errors.
    """
    for pause in _PAUSES:
        try:
            return action()
        except PermissionError as error:
            if not is_in_use(error):
                raise
            time.sleep(pause)
    return action()


def replace(source: Path, target: Path) -> None:
    """`os.replace`, patiently."""
    patiently(lambda: os.replace(source, target))


def is_private(path: Path) -> bool:
    """Return whether only this user can read or change a file or folder."""
    if not hasattr(os, "getuid"):  # Windows has folders for each user.
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


def is_number(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Return whether a host is an IP address or a valid name, which does not end in a number."""
    labels = host.removesuffix(".").split(".")
    is_name = all(re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", label) for label in labels)
    return is_number(host) or (is_name and not labels[-1].isdigit())


def split_host(value: str) -> tuple[str, str]:
    """Split ``name:port`` of a ``Host`` header; both parts are empty if it is not valid."""
    match = _HOST.fullmatch(value.lower())
    return (plain_host(match[1]), match[2] or "") if match else ("", "")


def plain_host(host: str) -> str:
    """Normalize a host name: lower case, without brackets and trailing dot."""
    return host.lower().strip("[]").removesuffix(".")


def is_loopback(host: str) -> bool:
    """Return whether an address is a loopback address of this machine."""
    return ipaddress.ip_address(host).is_loopback if is_number(host) else host == "localhost"
