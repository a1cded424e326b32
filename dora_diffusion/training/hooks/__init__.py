"""Optional features of a training step. A feature that is off is not in the list of hooks."""
