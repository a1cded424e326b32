"""Base models as files: Diffusers folders, and single files in the original layout."""
