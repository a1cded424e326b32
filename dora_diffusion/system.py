"""Operating-system differences: the one module that may use what only POSIX has.

Everything else is written against what Windows, Linux and macOS share.
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

# A closed terminal sends it; Windows has none.
HANGUP: int | None = getattr(signal, "SIGHUP", None)
# Ctrl-Break, and on Windows also what a closed console sends; others have none.
BREAK: int | None = getattr(signal, "SIGBREAK", None)
# Pressed by whoever sits at the terminal.
INTERRUPTS = tuple(number for number in (signal.SIGINT, BREAK) if number is not None)
STOP_SIGNALS = tuple(n for n in (*INTERRUPTS, signal.SIGTERM, HANGUP) if n is not None)

# What Windows says of a file that another program has open: access denied, a sharing violation.
_IN_USE = (5, 32)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def is_windows() -> bool:
    return os.name == "nt"


def let_break_interrupt() -> None:
    """Make Ctrl-Break raise `KeyboardInterrupt` from here on, as Ctrl-C does."""
    if BREAK is not None and threading.current_thread() is threading.main_thread():
        signal.signal(BREAK, signal.default_int_handler)


def detached() -> dict[str, Any]:
    """Keywords of `subprocess.Popen` for a process that outlives this one and its terminal."""
    if hasattr(os, "setsid"):
        return {"start_new_session": True}
    # No console of its own to be seen, and no Ctrl-C of ours.
    names = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
    return {"creationflags": sum(getattr(subprocess, name, 0) for name in names)}


def peak_memory() -> float:
    """Return the peak memory of this process, in GiB; the present one where none is kept."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 2**30
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def private_folder(name: str) -> Path:
    """A folder for temporary files, always the same one, which nobody else can enter or make.

    Args:
        name: What it is for.

    Raises:
        OSError: If what has its name is a link, another user's, or open to others.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    path = Path(tempfile.gettempdir(), f"dora-diffusion-{user}-{name}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or not path.is_dir() or not is_private(path):
        what = "is a link, another user's or open to others; remove it, or set TMPDIR elsewhere"
        raise PermissionError(errno.EACCES, what, str(path))
    return path


def short_folder() -> str:
    """Make a folder of this user's alone with a drawn name, which sockets may have below it.

    Their names have a hundred characters at most, and TMPDIR may take most of them, as on macOS.
    """
    return tempfile.mkdtemp(prefix="dora-", dir=None if is_windows() else "/tmp")


def drop_from_cache(handle: int) -> None:
    """Drop a file that is on the disk from the system's cache, where that is possible."""
    if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def is_in_use(error: OSError) -> bool:
    """Return whether Windows refused since another program has the file open."""
    return getattr(error, "winerror", None) in _IN_USE


def patiently(action: Callable[[], Result]) -> Result:
    """Retry what a virus scanner, or another process that reads the file now, is in the way of.

    Windows lets nobody rename, replace or remove a file that is open, nor open one that is being
    replaced. Such looks last for milliseconds: it is tried again for about a second and a half.

    Raises:
        OSError: Whatever else goes wrong, at once; or that it still is in use.
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
    """Return whether a file or folder is this user's, and nobody else may read or change it."""
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
    """Name and port of ``name:port``, as a ``Host`` header has it; both empty where it is none."""
    match = _HOST.fullmatch(value.lower())
    return (plain_host(match[1]), match[2] or "") if match else ("", "")


def plain_host(host: str) -> str:
    """A name in small letters, without an address' brackets and a last dot."""
    return host.lower().strip("[]").removesuffix(".")


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own and nobody else's."""
    return ipaddress.ip_address(host).is_loopback if is_number(host) else host == "localhost"
