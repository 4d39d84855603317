from ._backend import backend
from .activation_stats import ActivationStats
from .batch_topk_encode import batch_topk_encode
from .sae_loss import SAEError, sae_loss
from .sparse_decode import sparse_decode
from .threshold_encode import threshold_encode
from .topk_encode import topk_encode

__all__ = [
    "ActivationStats",
    "SAEError",
    "backend",
    "batch_topk_encode",
    "sae_loss",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]
