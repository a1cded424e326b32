"""Subcommands: dataclasses of settings, whose method `perform` runs the command."""
