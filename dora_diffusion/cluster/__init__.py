"""Beyond one process: fleets of trainings and serving over HTTP. The core imports none of it."""
