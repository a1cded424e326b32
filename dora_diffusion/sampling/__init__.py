"""Images of a model: generation, their files and metadata, many adapters in one batch."""
