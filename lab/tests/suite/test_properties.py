"""Property tests: the same examples in every run of the suite, many other ones in the long run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from tests.properties import at_least

ROOT = Path(__file__).parents[3]


@pytest.fixture
def profile():
    """Loads a profile for the length of a test."""
    loaded = settings.get_current_profile_name()
    yield settings.load_profile
    settings.load_profile(loaded)


def test_the_suite_tries_the_same_examples_and_the_long_run_ten_thousand_others(profile):
    profile("suite")
    assert (settings.default.max_examples, settings.default.derandomize) == (100, True)
    assert [at_least(count).max_examples for count in (20, 600)] == [100, 600]
    assert at_least(600).derandomize
    profile("long")
    assert (settings.default.max_examples, settings.default.derandomize) == (10_000, False)
    assert [at_least(count).max_examples for count in (600, 20_000)] == [10_000, 20_000]
    assert not at_least(600).derandomize
    # No verdict by the clock.
    assert settings.default.deadline is None


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_long_run_says_the_seed_that_repeats_it():
    def steps(*words: str) -> str:
        command = ["make", "--dry-run", "test-properties", *words]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout

    said = re.search(r"SEED=(\d+) repeats this run", steps())
    assert said
    repeated = steps(f"SEED={said[1]}")
    assert "-m hypothesis --hypothesis-profile=long" in repeated
    assert f"--hypothesis-seed={said[1]} " in repeated
