"""Trainable parameters: adapters, all weights, new words."""
