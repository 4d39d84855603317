"""One provider on one case: built, checked, and ready to be timed."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from . import measure, oracle
from .call import Unsupported
from .cases import Case
from .providers import Provider, ours_backend
from .workload import Workload


class Prepared(NamedTuple):
    """run is None where it cannot be timed; status then says why."""

    run: Callable[[], Any] | None
    status: str
    backend: str


def reason(error: BaseException) -> str:
    """A failure as the one line that stands in the status column."""
    if isinstance(error, Unsupported):
        return f"skipped: {error}"
    if measure.is_oom(error):
        return measure.OOM
    text = " ".join(str(error).split())
    return f"crashed: {type(error).__name__}: {text[:160]}"


def prepare(
    provider: Provider,
    op: str,
    mode: str,
    case: Case,
    device: str = "cpu",
    gate: bool = True,
    w: Workload | None = None,
) -> Prepared:
    """Builds the call and, with gate, checks its result against fp64. Whatever a provider raises becomes its status."""
    backend = ours_backend(device, op, mode, case) if provider.backend == "auto" else provider.backend
    if provider.package is not None:
        try:
            importlib.import_module(provider.package)
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            return Prepared(None, f"skipped: {provider.package} is not importable: {text}", backend)
    w = Workload(case, device) if w is None else w
    try:
        with measure.memory_guard(device):
            built = provider.build(op, mode, w)
            wrong = _wrong(provider, built, op, mode, w) if gate else None
    except Exception as error:
        return Prepared(None, reason(error), backend)
    if wrong:
        return Prepared(None, f"wrong: {wrong}", backend)
    return Prepared(built.call.run, measure.OK, backend)


def _wrong(provider: Provider, built, op: str, mode: str, w: Workload) -> str | None:
    if op == "module":  # reconstructions and gradients are compared where no selection is in doubt
        small = w.sample(oracle.STEP_ROWS)
        call = provider.build(op, mode, small).call
        return oracle.check(op, mode, small, call.read(call.run()))
    result = built.call.read(built.call.run())
    if built.check_as == "linear":
        return oracle.check("linear", "forward", w, result)
    return oracle.check(op, mode, w, result)
