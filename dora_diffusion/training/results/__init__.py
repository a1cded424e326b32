"""Results of a run: its folder, checkpoints, resuming, validation, the adapter and its card."""
