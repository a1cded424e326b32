"""The toy world of the embedded models: its renderer, its subjects, judges of its images."""
