"""Fleets of trainings, and serving over HTTP, beyond one process. The core imports none of it."""
