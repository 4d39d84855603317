from ._backend import backend
from .activation_stats import ActivationStats
from .sparse_decode import sparse_decode
from .topk_encode import topk_encode

__all__ = ["ActivationStats", "backend", "sparse_decode", "topk_encode"]
