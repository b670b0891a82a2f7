"""Number formats and the searches for their parameters: tensors in, tensors out; nothing here knows a graph."""
