"""Fast, exact kernels, modules and hooks for sparse autoencoders."""

from .ops import backend, sparse_decode, topk_encode

__version__ = "0.1.0"

__all__ = ["backend", "sparse_decode", "topk_encode"]
