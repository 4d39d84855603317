"""sparse_decode against torch and other libraries: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("sparse_decode"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "sparse_decode", "forward", case, provider)


@pytest.mark.parametrize(("case", "provider"), parameters("sparse_decode"))
def test_backward(benchmark, case, provider):
    compare(benchmark, "sparse_decode", "backward", case, provider)
