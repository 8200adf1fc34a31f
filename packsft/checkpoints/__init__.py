"""Checkpoints: written whole, resumed by the same run."""
