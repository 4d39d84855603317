"""What the pytest-benchmark files share: one (op, mode) timed over the registry's quick cases and providers."""

import pytest

from sae_kernels.bench.cases import CASES
from sae_kernels.bench.cell import prepare
from sae_kernels.bench.providers import PROVIDERS


def parameters(op: str) -> list:
    names = [case.name for case in CASES.values() if case.quick and op in case.ops]
    return [pytest.param(name, key, id=f"{name}-{key}") for name in names for key in PROVIDERS]


def compare(benchmark, op: str, mode: str, case_name: str, key: str) -> None:
    """Checks the provider's result against fp64, then times it; skips with the reason where it cannot run."""
    case, provider = CASES[case_name], PROVIDERS[key]
    prepared = prepare(provider, op, mode, case)
    if prepared.run is None:
        assert key != "sae_kernels", prepared.status
        pytest.skip(prepared.status)
    benchmark.group = f"{op} {mode}, {case_name}"
    benchmark.extra_info.update(op=op, mode=mode, provider=provider.name, backend=prepared.backend, case=case_name)
    benchmark.pedantic(prepared.run, rounds=5, warmup_rounds=1)
