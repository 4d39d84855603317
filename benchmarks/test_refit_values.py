"""refit_values against torch: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("refit_values"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "refit_values", "forward", case, provider)
