"""A process of its own for a provider: an allocator that hides no peak, a crash that stops nothing, a library that
changes torch for itself alone, another commit's kernels.

Requests and replies are JSON lines on stdin and stdout. SAE_BENCH_LIBRARY names the folder of the sae_kernels to
measure; this suite itself is loaded under another name, so that it may be newer than that library.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENTRY = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sae_bench_worker", {str(HERE / "worker.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.serve()
"""


class WorkerDied(Exception):
    """The process ended; `killed` where the system killed it, as it does when memory runs out."""

    def __init__(self, code: int | None) -> None:
        self.killed = code == -9
        super().__init__("OOM" if self.killed else f"crashed: the process ended with code {code}")


class Team:
    """Workers by name, started when first asked and started again after one has died."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        """The reply; where the worker dies, its reason as the status."""
        import torch

        if name not in self._workers:
            self._workers[name] = Worker(threads=torch.get_num_threads())
        try:
            return self._workers[name].ask(**request)
        except WorkerDied as error:
            self._workers.pop(name).close()
            return {"status": str(error)}

    def rest(self) -> None:
        """Frees what the last call left behind."""
        for name in list(self._workers):
            self.ask(name, do="free")

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()


class Worker:
    """One such process. library: folder that holds the sae_kernels to measure (this one's where None)."""

    def __init__(self, library: Path | None = None, threads: int | None = None) -> None:
        from .measure import worker_environment

        env = worker_environment()
        env["SAE_BENCH_LIBRARY"] = str(library or HERE.parents[1])
        if threads is not None:
            env["SAE_BENCH_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then closes its workers
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise WorkerDied(self._process.wait())
        return json.loads(reply)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve() -> None:
    """Answers requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    sys.path.insert(0, os.environ["SAE_BENCH_LIBRARY"])
    served = _Served()
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(getattr(served, request.pop("do"))(**request)) + "\n")
        replies.flush()


def _suite(module: str) -> Any:
    """A module of this suite, under a name that no sae_kernels holds."""
    if "sae_bench" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "sae_bench", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
        )
        sys.modules["sae_bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sae_bench"])
    return importlib.import_module(f"sae_bench.{module}")


class _Served:
    def __init__(self) -> None:
        self._run = None

    def build(self, op: str, mode: str, case: dict[str, Any], provider: str, gate: bool = True) -> dict[str, Any]:
        """Makes the call ready and checks it; the reply's status is "ok" or the reason why not."""
        import torch

        if "SAE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["SAE_BENCH_THREADS"]))
        cell, cases = _suite("cell"), _suite("cases")
        case["ops"] = tuple(case["ops"])
        prepared = cell.prepare(_suite("providers").PROVIDERS[provider], op, mode, cases.Case(**case), gate=gate)
        self._run = prepared.run
        return {"status": prepared.status, "backend": prepared.backend}

    def free(self) -> dict[str, Any]:
        self._run = None
        return {"status": "ok"}

    def time(self, calls: int) -> dict[str, Any]:
        try:
            with _suite("measure").memory_guard():
                return {"status": "ok", "seconds": _suite("measure").seconds(self._run, calls)}
        except Exception as error:
            return {"status": _suite("cell").reason(error)}

    def memory(self, op: str, mode: str, case: dict[str, Any], provider: str) -> dict[str, Any]:
        """Peak extra bytes of one call; a call on a few rows comes first, so that libraries have loaded their code."""
        import torch

        if "SAE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["SAE_BENCH_THREADS"]))
        self._run = None
        cell, cases, measure = _suite("cell"), _suite("cases"), _suite("measure")
        case["ops"] = tuple(case["ops"])
        full = cases.Case(**case)
        chosen = _suite("providers").PROVIDERS[provider]
        few = cell.prepare(chosen, op, mode, full.with_rows(min(16, full.rows)), gate=False)
        if few.run is None:
            return {"status": few.status, "bytes": None}
        few.run()
        del few
        prepared = cell.prepare(chosen, op, mode, full, gate=False)
        if prepared.run is None:
            return {"status": prepared.status, "bytes": None}
        try:
            with measure.memory_guard():
                return {"status": "ok", "bytes": measure.peak_extra_bytes(prepared.run, op, mode, full)}
        except Exception as error:
            return {"status": cell.reason(error), "bytes": None}

    def cold(
        self, package: str, op: str, mode: str, case: dict[str, Any], provider: str, device: str = "cpu"
    ) -> dict[str, Any]:
        """Seconds to import `package` once torch is there, and of the first call, with no kernel compiled before."""
        import torch

        with tempfile.TemporaryDirectory(prefix="sae-kernels-cold-") as empty:
            os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            return self._cold(torch, package, op, mode, case, provider, device)

    @staticmethod
    def _cold(torch: Any, package: str, op: str, mode: str, case: dict, provider: str, device: str) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            importlib.import_module(package)
        except Exception as error:
            return {"status": f"not importable: {' '.join(str(error).split())[:160]}"}
        imported = time.perf_counter() - start
        ones = torch.ones(8, 8, device=device)
        float((ones @ ones).sum())
        cell, cases = _suite("cell"), _suite("cases")
        case["ops"] = tuple(case["ops"])
        workload = _suite("workload").Workload(cases.Case(**case), device)
        chosen = _suite("providers").PROVIDERS[provider]
        prepared = cell.prepare(chosen, op, mode, workload.case, device, gate=False, w=workload)
        if prepared.run is None:
            return {"status": prepared.status, "import": imported}
        try:
            first = _suite("measure").seconds(prepared.run, 1, device)
        except Exception as error:
            return {"status": cell.reason(error), "import": imported}
        return {"status": "ok", "import": imported, "first": first, "backend": prepared.backend}
