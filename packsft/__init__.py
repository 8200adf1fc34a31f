"""packsft: packed supervised fine-tuning, a drop-in for TRL's `SFTTrainer`."""

from packsft_kernels.version import __version__

__all__ = ["__version__"]
