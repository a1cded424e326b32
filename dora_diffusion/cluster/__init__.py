"""Training of fleets and serving over HTTP. The rest of the package does not import it."""
