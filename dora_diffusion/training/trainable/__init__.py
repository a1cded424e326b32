"""Trainable parts: adapters, all weights, words, ranks."""
