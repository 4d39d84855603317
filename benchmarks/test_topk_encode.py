"""topk_encode against torch and other libraries: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("topk_encode"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "topk_encode", "forward", case, provider)


@pytest.mark.parametrize(("case", "provider"), parameters("topk_encode"))
def test_backward(benchmark, case, provider):
    compare(benchmark, "topk_encode", "backward", case, provider)
