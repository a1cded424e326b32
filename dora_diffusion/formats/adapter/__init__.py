"""Reading and writing of adapter files in all known key formats."""
