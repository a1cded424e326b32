"""Bytes on disk: atomic files, and safetensors that are read and written tensor by tensor."""
