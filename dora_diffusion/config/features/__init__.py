"""Features of training: settings, and what each states about itself; `training.features` runs."""
