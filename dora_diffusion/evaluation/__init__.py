"""Subject fidelity, prompt fidelity, subject leakage and language drift of an adapter."""
