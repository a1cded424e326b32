"""How the embedded models were made: `python -m dora_diffusion.embedded.pretrain --help`.

The stages run in this order, each resumable, each within a time budget: data, instrument, vae,
latents, diffusion, ship. All of them run on two CPU cores without any download.
"""
