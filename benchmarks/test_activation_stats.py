"""activation_stats against torch and other libraries: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("activation_stats"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "activation_stats", "forward", case, provider)
