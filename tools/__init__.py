"""Programs beside the package, run from a clone with the package installed."""
