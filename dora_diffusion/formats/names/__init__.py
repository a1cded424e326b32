"""Names of modules and tensors, and how each layout calls them."""
