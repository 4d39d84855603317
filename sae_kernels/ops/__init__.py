from ._backend import backend
from .activation_stats import ActivationStats
from .batch_topk_encode import batch_topk_encode
from .sparse_decode import sparse_decode
from .threshold_encode import threshold_encode
from .topk_encode import topk_encode

__all__ = ["ActivationStats", "backend", "batch_topk_encode", "sparse_decode", "threshold_encode", "topk_encode"]
