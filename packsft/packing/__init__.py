"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""
