"""A merged Diffusers folder: what it holds, and how it is written."""
