"""The tabs. Each module has a class of fields, and ``connect`` says what they do."""
