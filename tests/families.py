"""Families for tests that hold for some of them."""

from __future__ import annotations

from dora_diffusion.config.families import FAMILIES

UNETS = {name: family for name, family in FAMILIES.items() if family.has_unet}
"""Families whose denoiser is a UNet."""
