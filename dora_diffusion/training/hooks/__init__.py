"""Features of a run beside its main path. A feature that is off is not in the list of hooks."""
