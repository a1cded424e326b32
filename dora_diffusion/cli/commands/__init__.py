"""What each subcommand does: ``run(args)`` of the module with its name."""
