"""The four tabs. Each module has ``build`` (the fields) and ``connect`` (what they do)."""
