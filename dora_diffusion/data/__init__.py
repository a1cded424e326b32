"""Photos on disk to training batches."""
