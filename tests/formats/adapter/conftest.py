"""Shallow models are enough here."""

from tests.shallow import *  # noqa: F403
