from .code import SparseCode
from .loss import SAELoss, squared_error, total_variance
from .normalize import NORMALIZERS, Normalizer
from .sae import TopKSAE
from .sharded import ShardedTopKSAE

__all__ = [
    "NORMALIZERS",
    "Normalizer",
    "SAELoss",
    "ShardedTopKSAE",
    "SparseCode",
    "TopKSAE",
    "squared_error",
    "total_variance",
]
