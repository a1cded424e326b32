"""Programs beside the package, run from a clone."""
