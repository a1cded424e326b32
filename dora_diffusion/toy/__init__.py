"""The toy world of the embedded models: its renderer, and networks that judge its images."""
