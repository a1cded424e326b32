"""What a step is computed from: subjects, photos, class images, noise and timesteps."""
