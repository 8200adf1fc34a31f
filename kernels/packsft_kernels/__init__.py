"""Loss and attention for packed sequences, on tensors. Imports nothing of Hugging Face."""

from packsft_kernels.cross_entropy import cross_entropy
from packsft_kernels.linear_cross_entropy import linear_cross_entropy
from packsft_kernels.loss_options import LossOptions, LossOutput
from packsft_kernels.varlen_attention import varlen_attention
from packsft_kernels.version import __version__

__all__ = ["LossOptions", "LossOutput", "__version__", "cross_entropy", "linear_cross_entropy", "varlen_attention"]
