from .batch_topk import BatchTopKSAE
from .code import SparseCode
from .jumprelu import JumpReLUSAE
from .loss import SAELoss, squared_error, total_variance
from .normalize import NORMALIZERS, Normalizer
from .sae import TopKSAE
from .sharded import ShardedTopKSAE

VARIANTS = {sae.variant: sae for sae in (TopKSAE, BatchTopKSAE, JumpReLUSAE)}

__all__ = [
    "BatchTopKSAE",
    "JumpReLUSAE",
    "NORMALIZERS",
    "Normalizer",
    "SAELoss",
    "ShardedTopKSAE",
    "SparseCode",
    "TopKSAE",
    "VARIANTS",
    "squared_error",
    "total_variance",
]
