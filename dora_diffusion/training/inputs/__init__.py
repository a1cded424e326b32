"""Inputs of a step: subjects, photos, class images, noise and timesteps."""
