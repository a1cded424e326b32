"""What can train: adapters, all weights, words, ranks."""
