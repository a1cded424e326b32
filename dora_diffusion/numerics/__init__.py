"""Pure numerics: tensors in, tensors out. Imports torch only."""
