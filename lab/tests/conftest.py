"""Fixtures of the package's tests."""

from tests.conftest import *  # noqa: F403
