from ._backend import backend
from .sparse_decode import sparse_decode
from .topk_encode import topk_encode

__all__ = ["backend", "sparse_decode", "topk_encode"]
