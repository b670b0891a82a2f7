"""Measurements and judgements: what the machine is, how fast, how much memory, how close to the original."""
