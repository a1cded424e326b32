"""Evaluation in the toy world, where the truth can be rendered, by judges trained on renders."""
