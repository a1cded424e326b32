"""The reader of callgrind's profiles (`benchmarks/instructions.py`), on a profile made by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HOME = Path(__file__).parents[3] / "benchmarks" / "instructions.py"

spec = importlib.util.spec_from_file_location("instructions", HOME)
instructions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(instructions)

GEMM = "at::native::cpublas::(anonymous namespace)::cpublas_gemm_impl(c10::ScalarType)"
PROFILE = f"""\
# callgrind format
version: 1
positions: line
events: Ir
summary: 1057

ob=(1) /usr/lib/libpython3.11.so.1.0
fl=(1) ceval.c
fn=(1) eval
10 20
+3 5
cob=(2) /usr/lib/libtorch_cpu.so
cfi=(2) ???
cfn=(2) {GEMM}
calls=2 40
* 1030
-2 1

ob=(2)
fl=(2)
fn=(2)
40 1000
cob=(1)
cfn=(1)
calls=1 10
+1 30

ob=(1)
fn=(3) at::vec::name_outside_of_torch
* 1
"""


def test_own_instructions_are_summed_by_library_and_function(tmp_path):
    path = tmp_path / "profile.1"
    path.write_text(PROFILE, encoding="utf-8")
    profile = instructions.parse(path)
    python = "libpython3.11.so.1.0"
    assert profile == {
        (python, "eval"): 26,
        ("libtorch_cpu.so", GEMM): 1000,
        (python, "at::vec::name_outside_of_torch"): 1,
    }
    assert instructions.issuing(profile) == 27
