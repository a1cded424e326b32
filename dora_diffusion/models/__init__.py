"""Models of the supported families: loading, encoding, prediction, memory of devices."""
