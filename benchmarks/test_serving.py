"""serving against torch and other libraries: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("serving"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "serving", "forward", case, provider)
