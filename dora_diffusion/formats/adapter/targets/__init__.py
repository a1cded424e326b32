"""The ways to write one adapter. Each target turns layers into named files; a registry holds them.

What each consumer computes from which file differs; see docs/formats.md.
"""
