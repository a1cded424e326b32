"""Training of the embedded models: ``python -m lab.pretrain --help``, from the clone.

The stages run in this order, each resumable, each within a time budget: images, instrument, vae,
latents, diffusion, ship, card. All of them run on two CPU cores without any download.
"""
