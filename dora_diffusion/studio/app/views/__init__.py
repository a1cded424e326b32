"""The tabs. Each module has a class of fields, and ``connect`` adds their event handlers."""
