"""Inputs of a run: base model, subjects, photos, cached latents, held-out photos, priors."""
