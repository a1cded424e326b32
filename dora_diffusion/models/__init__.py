"""Load and call models of the Stable Diffusion families."""
