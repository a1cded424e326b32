"""DoRA on a live module tree: layers, targets, injection, state."""
