"""Speculative decoding: something cheap drafts tokens, one step of the model verifies them all, and the text stays the
model's own."""
