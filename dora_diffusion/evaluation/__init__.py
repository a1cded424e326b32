"""Subject fidelity and prompt fidelity in the toy world, judged by networks."""
