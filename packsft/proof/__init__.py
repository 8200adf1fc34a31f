"""Proofs that packed training is the same training."""
