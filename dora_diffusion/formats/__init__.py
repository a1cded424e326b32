"""Names and bytes on disk. Imports no model code."""
