"""DoRA image personalization for Stable Diffusion and SDXL."""
