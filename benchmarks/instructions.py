"""Instructions of Python functions by native function, counted by valgrind's callgrind.

Counts do not depend on the load of the machine. The counted process calls `instrument` once and
`collect` for each function; the counting process calls `profiles` with the command of the former.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

# A function of Python's C API that Python itself calls only for ``python -c``.
SWITCH = "PyRun_SimpleStringFlags"

# Native functions that compute numbers of tensors. Torch's kernels are in namespaces of a processor
# type, or without a name; what chooses and starts them is not.
KERNEL = re.compile(
    r"at::native::(\(anonymous namespace\)|AVX\w+|DEFAULT|cpublas)|at::vec::"
    r"|function_ref<void \(char\*\*|Sleef_|^mkl_|^__(exp|log|sin|cos)f|^__mem(set|cpy|move)_"
)

Profile = Counter[tuple[str, str]]
"""Instructions by library and function."""


def instrument() -> None:
    """Begin to follow calls. Until here, the process runs several times faster."""
    command = ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:  # Valgrind answers while instructions are executed.
            pass
    if process.returncode:
        raise RuntimeError("valgrind cannot be reached by vgdb")


def collect(function: Callable[[], object]) -> None:
    """Call a function and count its instructions."""
    sys.modules["__main__"].__dict__["_collected"] = function
    gc.collect()
    gc.disable()
    if ctypes.pythonapi.PyRun_SimpleString(b"_collected()"):
        raise RuntimeError("the counted function failed")
    gc.enable()


def profiles(command: Sequence[str]) -> list[Profile]:
    """Run a Python script under callgrind. Returns the profile of each call of `collect`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile")
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
        options = [f"--toggle-collect={SWITCH}", f"--dump-after={SWITCH}"]
        run = [*valgrind, *options, f"--callgrind-out-file={path}", sys.executable, *command]
        subprocess.run(run, check=True, env=os.environ | {"PYTHONHASHSEED": "0"})
        files = sorted(Path(folder).glob("profile.*"), key=lambda file: int(file.suffix[1:]))
        return [parse(file) for file in files]


def parse(path: Path) -> Profile:
    """Read a callgrind file: a name is written once, with the number that later lines have."""
    names: dict[tuple[str, str], str] = {}
    profile: Profile = Counter()
    library = function = ""
    is_call = False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if match := re.match(r"c?(ob|fn)=\((\d+)\)(?: (.+))?", line):
                kind, number, name = match.groups()
                name = names.setdefault((kind, number), name or "")
                if line.startswith("ob"):
                    library = name.rpartition("/")[2]
                elif line.startswith("fn"):
                    function = name
            elif line.startswith("calls="):
                is_call = True  # The next line has the instructions of the called function.
            elif re.match(r"[\d+*-]", line):
                if not is_call:
                    profile[library, function] += int(line.split()[1])
                is_call = False
    return profile


def is_kernel(library: str, function: str) -> bool:
    """Return whether a native function computes, rather than issues operations."""
    return library.startswith(("libtorch_cpu", "libc.", "libm.")) and bool(KERNEL.search(function))


def issuing(profile: Profile) -> int:
    """Return the instructions outside of kernels."""
    return sum(count for key, count in profile.items() if not is_kernel(*key))
