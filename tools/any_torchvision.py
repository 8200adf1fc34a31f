"""Imports torchvision where there is one, also a build for another torch than the one here.

The operators of such a build cannot be loaded, and transformers cannot be imported beside it. Processors use none of
them.
"""

import contextlib

import torch

with contextlib.suppress(ImportError):
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):  # which it describes when it is imported
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401
