"""Graphs as data, for people to read and compare: views, their text, and what changed between two of them.

Nothing here runs a graph or knows the libraries that do. A view is made of a Program by ``program_view`` and of an
artifact's ``model.onnx`` by the backend that reads such files; everything else works on views alone.
"""
