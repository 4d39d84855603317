"""Fast, exact kernels, modules and hooks for sparse autoencoders."""

from ._info import info
from .hooks import attach, record
from .nn import BatchTopKSAE, JumpReLUSAE, SparseCode, TopKSAE
from .ops import ActivationStats, backend, batch_topk_encode, sae_loss, sparse_decode, threshold_encode, topk_encode

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "BatchTopKSAE",
    "JumpReLUSAE",
    "SparseCode",
    "TopKSAE",
    "attach",
    "backend",
    "batch_topk_encode",
    "info",
    "record",
    "sae_loss",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]
