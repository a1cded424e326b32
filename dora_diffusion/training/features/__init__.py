"""Code of the features of training, imported if they are on; `config.features` has settings."""
