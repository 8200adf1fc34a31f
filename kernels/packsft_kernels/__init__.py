"""Loss and attention for packed sequences. Knows tensors; knows nothing of Hugging Face."""

from packsft_kernels.version import __version__

__all__ = ["__version__"]
