"""The Stable Diffusion families as data, and how they are loaded."""
