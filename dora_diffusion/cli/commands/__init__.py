"""Subcommands: each is ``run(args)`` of the module with its name."""
