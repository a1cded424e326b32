"""The images of the documents, each made by `python -m tools.images NAME`."""
