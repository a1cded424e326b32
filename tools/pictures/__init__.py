"""The images of the documents, each made anew by `python -m tools.pictures NAME`."""
