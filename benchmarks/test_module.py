"""module against torch and other libraries: pytest benchmarks --benchmark-only."""

import pytest

from .comparison import compare, parameters


@pytest.mark.parametrize(("case", "provider"), parameters("module"))
def test_forward(benchmark, case, provider):
    compare(benchmark, "module", "forward", case, provider)


@pytest.mark.parametrize(("case", "provider"), parameters("module"))
def test_step(benchmark, case, provider):
    compare(benchmark, "module", "step", case, provider)
