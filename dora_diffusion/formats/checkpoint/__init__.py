"""Base models on disk: Diffusers folders, and single files in the original layout."""
