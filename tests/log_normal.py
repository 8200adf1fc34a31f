"""Lengths as log-normal as those of Dolly-, Alpaca- and Tulu-like data sets, and as many."""

import numpy as np

LIKE = {"Dolly": (4.9, 0.9, 15_000), "Alpaca": (4.45, 0.6, 52_000), "Tulu": (6.0, 1.0, 50_000)}  # mu, sigma, rows


def lengths_like(name, max_length):
    """`clip(lognormal(mu, sigma), 8, max_length)`, seed 0."""
    mu, sigma, num_rows = LIKE[name]
    return np.clip(np.random.default_rng(0).lognormal(mu, sigma, num_rows), 8, max_length).astype(int)
