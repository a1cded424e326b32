"""A short run, whose result the commands take."""

from tests.cli.commands.conftest import last_line, photos, train_flags, trained  # noqa: F401
