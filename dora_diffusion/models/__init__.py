"""How a model of a Stable Diffusion family is loaded and called."""
