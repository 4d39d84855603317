"""The benchmark suite: one registry of cases, one of providers, one runner; what `sae-kernels bench` runs."""

from .cases import CASES, OPS, Case
from .measure import Row
from .providers import PROVIDERS
from .runner import run

__all__ = ["CASES", "OPS", "PROVIDERS", "Case", "Row", "run"]
