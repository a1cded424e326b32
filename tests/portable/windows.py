"""Linux that refuses what Windows has not or does not allow, and is asked for by this project.

Only emulated: no Windows runs here. What only POSIX has is gone for this project's own modules and
tests; the standard library, psutil, torch and the rest, which have code of their own for Windows,
see it as before. What Windows forbids to do with files is forbidden to everybody.

    names     modules, functions, signals and /proc, which Windows has not; `os.kill` ends a process
              at once, whatever the signal; Ctrl-Break (SIGBREAK) is there
    processes no sessions of their own, no fork: multiprocessing starts by spawn
    files     one that is open or mapped, in any of our processes, cannot be renamed, replaced or
              removed, nor the folder that it is in; one that is mapped cannot be cut; a rename
              replaces nothing; a folder is not replaced; no two names differ in case alone; no
              name holds `< > : " | ? *`, ends with a dot or a space, or is a device's
"""

from __future__ import annotations

import atexit
import builtins
import errno
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

OURS = ("dora_diffusion", "lab", "tests", "tools", "benchmarks")
ROOT = Path(__file__).resolve().parents[2]

GONE_MODULES = (
    "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty",
)  # fmt: skip
GONE = {
    "os": (
        "chown", "chroot", "ctermid", "fchdir", "fchown", "fork", "forkpty", "fpathconf",
        "getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp",
        "getpriority", "getsid", "getuid", "initgroups", "killpg", "lchown", "lockf", "mkfifo",
        "nice", "openpty", "pathconf", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread",
        "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sched_yield",
        "sendfile", "setgid", "setpgid", "setpriority", "setsid", "setuid", "statvfs", "sync",
        "sysconf", "sysconf_names", "uname", "wait", "wait3", "wait4", "waitid",
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "POSIX_FADV_DONTNEED", "P_PID",
        "WEXITED", "WNOHANG", "WNOWAIT",
    ),
    "signal": (
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP",
        "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGWINCH", "alarm", "getitimer", "pause", "pthread_kill",
        "pthread_sigmask", "setitimer", "siginterrupt", "sigpending", "sigwait",
    ),
}  # fmt: skip

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
_DEVICE = re.compile(r"(con|nul|aux|prn|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# They do for others what these asked for.
_BETWEEN = {
    "_pyio", "codecs", "contextlib", "genericpath", "glob", "importlib", "io", "os", "pathlib",
    "posixpath", "shutil", "subprocess", "tempfile", "unittest", "windows", "zipfile",
}  # fmt: skip
_NOT_FILES = ("/dev/", "/proc/", "/sys/")
_PROCESSES = "DORA_DIFFUSION_PORTABLE_PROCESSES"
_IN_USE, _DENIED = 32, 5
# Which argument is the new name.
_NEW_NAMES = {"os.mkdir": 0, "os.link": 1, "os.symlink": 1}
_EVENTS = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", *_NEW_NAMES}

_real_kill, _real_rename = os.kill, os.rename
# Not `signal.SIGKILL`: this module may be imported where that is gone.
_KILL = signal.Signals.SIGKILL
_looking = threading.local()
_processes = ""


def install() -> None:
    """Emulate Windows from here on, in this process and in those that it starts."""
    if _PROCESSES not in os.environ:
        os.environ[_PROCESSES] = tempfile.mkdtemp(prefix="portable-")
        atexit.register(shutil.rmtree, os.environ[_PROCESSES], ignore_errors=True)
    # Kept: a test may clear the environment.
    global _processes
    _processes = os.environ[_PROCESSES]
    Path(_processes, str(os.getpid())).touch()
    _remove_names()
    _start_processes_as_windows_does()
    _guard_folders_of_posix()
    os.rename = _rename
    sys.addaudithook(_audit)


def is_installed() -> bool:
    """Return whether this process emulates Windows."""
    return "sitecustomize" in sys.modules and hasattr(sys.modules["sitecustomize"], "windows")


# Who asks.


def _is_ours(frame: FrameType | None) -> bool:
    """Return whether code is this project's, or a program that a test gives to ``python -c``."""
    if frame is None:
        return False
    name = str(frame.f_globals.get("__name__"))
    if name.partition(".")[0] in OURS:
        return True
    if name not in ("__main__", "__mp_main__"):
        return False
    spec, file = frame.f_globals.get("__spec__"), frame.f_globals.get("__file__")
    if spec is not None:
        return spec.name.partition(".")[0] in OURS
    return file is None or Path(file).resolve().is_relative_to(ROOT)


def _asked_by_us(*between: str) -> bool:
    """Return whether this project called, through whatever libraries do others' work."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _top(frame) in _BETWEEN | {*between}:
        frame = frame.f_back
    return _is_ours(frame)


def _top(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


# Names.


def _remove_names() -> None:
    signal.SIGBREAK = signal.SIGUSR1  # type: ignore[attr-defined]
    for module, names in ((os, GONE["os"]), (signal, GONE["signal"])):
        kept = {name: vars(module).pop(name) for name in names if hasattr(module, name)}
        module.__class__ = _guarded(kept)
    builtins.__import__ = _without_gone(builtins.__import__)
    importlib.import_module = _without_gone(importlib.import_module)
    os.kill = _kill


def _guarded(kept: dict[str, Any]) -> type[ModuleType]:
    """A module that gives names to others, and says to us that it has none of them."""

    class Guarded(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in kept or _is_ours(sys._getframe(1)):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return kept[name]

    return Guarded


def _without_gone(real: Any) -> Any:
    def importing(name: str, *args: Any, **options: Any) -> Any:
        if name in GONE_MODULES and _asked_by_us("_pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    return importing


def _kill(pid: int, number: int) -> None:
    """Windows ends a process, and knows no signals between processes."""
    _real_kill(pid, _KILL if number and _asked_by_us() else number)


# Processes.


def _start_processes_as_windows_does() -> None:
    import multiprocessing

    multiprocessing.set_start_method("spawn", force=True)
    real_init, real_send = subprocess.Popen.__init__, subprocess.Popen.send_signal

    def init(self: Any, *args: Any, **options: Any) -> None:
        for name in ("start_new_session", "preexec_fn", "process_group", "pass_fds", "umask"):
            if options.get(name) and _asked_by_us():
                raise ValueError(f"{name} is not supported on Windows platforms")
        real_init(self, *args, **options)

    def send_signal(self: Any, number: int) -> None:
        real_send(self, _KILL if _asked_by_us() else number)

    subprocess.Popen.__init__ = init  # type: ignore[method-assign]
    subprocess.Popen.send_signal = send_signal  # type: ignore[method-assign]


# Files.


def _guard_folders_of_posix() -> None:
    def guarded(real: Any) -> Any:
        def stat(path: Any, *args: Any, **options: Any) -> Any:
            _refuse_posix_folder(path)
            return real(path, *args, **options)

        for functions in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if real in functions:
                functions.add(stat)
        return stat

    os.stat, os.lstat = guarded(os.stat), guarded(os.lstat)


def _refuse_posix_folder(path: Any) -> None:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if isinstance(text, str) and f"{text}/".startswith("/proc/") and _asked_by_us():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Refuse what Windows would: Python tells of each thing that is done with a file before it."""
    if event not in _EVENTS or getattr(_looking, "now", False):
        return
    _looking.now = True  # What is opened to look is not to be looked at.
    try:
        _check(event, args)
    finally:
        _looking.now = False


def _check(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = args
        _refuse_posix_folder(path)
        if flags & (os.O_CREAT | os.O_TRUNC) and (text := _file(path)):
            _check_name(text)
            # A folder is opened so for a temporary file without a name.
            truncates = flags & os.O_TRUNC and not os.path.isdir(text)
            if truncates and _holders(text, mapped_only=True):
                raise _refusal(text, _IN_USE)
    elif event in ("os.listdir", "os.scandir"):
        _refuse_posix_folder(args[0])
    elif event in ("os.remove", "os.rmdir") and (text := _file(args[0], args[1])):
        _check_free(text)
    elif event in _NEW_NAMES and (text := _file(args[_NEW_NAMES[event]])):
        _check_name(text)
    elif event == "os.rename":
        _check_move(_file(args[0], args[2]), _file(args[1], args[3]))


def _file(path: Any, folder: int = -1) -> str:
    """An absolute path, with the links of its folder followed; empty for what is not a file's."""
    if isinstance(path, int) or path is None:
        return ""
    text = os.fsdecode(path)
    if folder != -1:
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    text = os.path.abspath(text)
    if text.startswith(_NOT_FILES):
        return ""
    return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))


def _check_name(path: str) -> None:
    """Refuse a name that Windows does not have, and one that differs in case alone."""
    folder, name = os.path.split(path)
    if name and not is_name(name):  # The root of a disk has none.
        raise OSError(errno.EINVAL, "The filename, directory name is incorrect", path)
    if not os.path.lexists(path) and os.path.isdir(folder):
        for other in os.listdir(folder):
            if other != name and other.casefold() == name.casefold():
                raise FileExistsError(errno.EEXIST, f"there is {other!r}, the same name", path)


def is_name(name: str) -> bool:
    """Return whether Windows lets a file be called so."""
    return bool(name) and not _FORBIDDEN.search(name) and not _DEVICE.fullmatch(name)


def _check_move(source: str, target: str) -> None:
    if not source or not target:
        return
    if source.casefold() != target.casefold():
        _check_name(target)
    _check_free(source)
    if os.path.isdir(target):
        raise _refusal(target, _DENIED)
    if os.path.lexists(target):
        _check_free(target)


def _rename(source: Any, target: Any, **options: Any) -> None:
    """`os.rename`, which replaces nothing on Windows."""
    if not options and os.path.lexists(target) and not os.path.samefile(source, target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    _real_rename(source, target, **options)


def _check_free(path: str) -> None:
    if not _asked_by_pytest() and _holders(path):
        raise _refusal(path, _IN_USE)


def _asked_by_pytest() -> bool:
    """It removes folders of earlier sessions, thousands of files."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _top(frame) in _BETWEEN:
        frame = frame.f_back
    return frame is not None and _top(frame) == "_pytest"


def _refusal(path: str, number: int) -> PermissionError:
    error = PermissionError(errno.EACCES, "used by another process", path)
    error.winerror = number  # type: ignore[attr-defined]
    return error


def _holders(path: str, *, mapped_only: bool = False) -> list[str]:
    """The open and mapped files, in our processes, that a path is or holds."""
    found = []
    for pid in os.listdir(_processes):
        try:
            held = _mapped(pid) if mapped_only else _mapped(pid) + _opened(pid)
        except OSError:  # it has ended
            continue
        inside = path + os.sep
        found += [file for file in held if file == path or file.startswith(inside)]
    return [file for file in found if os.path.isfile(file)]


def _opened(pid: str) -> list[str]:
    folder = f"/proc/{pid}/fd"
    files = []
    for number in os.listdir(folder):
        try:
            files.append(os.readlink(f"{folder}/{number}"))
        except OSError:  # closed meanwhile
            continue
    return files


def _mapped(pid: str) -> list[str]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        lines = {line.rstrip("\n").partition("/")[2] for line in maps if "/" in line}
    return [f"/{line}" for line in lines if not line.endswith((".so", ".pyc", "(deleted)"))]
