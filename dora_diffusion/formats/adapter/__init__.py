"""Adapter files: read in every known key format, written in every known key format."""
