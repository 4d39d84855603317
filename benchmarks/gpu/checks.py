"""What has to hold before anything is timed: the native libraries are built and every GPU test passes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# op -> the gates that must be open before it is timed
NEEDS = {
    "topk_encode": ("topk_encode",),
    "sparse_decode": ("sparse_decode",),
    "module": ("topk_encode", "sparse_decode", "sae_loss", "module"),
    "activation_stats": ("activation_stats",),
    "serving": ("topk_encode",),
    "first_call": ("topk_encode",),
}
BUILD_SECONDS = 240


def gates(tests: Path) -> dict[str, list[Path]]:
    """Gate -> its test files: test_triton_<op>.py, test_cuda_<op>.py and test_gpu_<op>.py; a test_gpu file of no op
    belongs to module.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(path for kind in ("triton", "cuda", "gpu") for path in tests.glob(f"test_{kind}_*.py")):
        kind, name = re.fullmatch(r"test_(triton|cuda|gpu)_(\w+)", path.stem).groups()
        of_op = (ROOT / "sae_kernels" / "ops" / f"{name}.py").is_file()
        if of_op or kind == "gpu":
            found.setdefault(name if of_op else "module", []).append(path)
    return found


def environment(device: str) -> dict[str, str]:
    """What a process needs so that the Triton kernels run on the device: the interpreter for a rehearsal on the CPU."""
    return {} if device != "cpu" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def build(log: Path) -> str:
    """Builds the native libraries in place; "ok", or why not. The Triton kernels need none."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return _run(command, log, BUILD_SECONDS, {})[0]


def run_tests(device: str, out: Path, commit: str, seconds: float, tests: Path) -> dict[str, str]:
    """Gate -> "ok: ..." or why it stays shut. Gates that were open for this commit in out/tests.json are not run again.

    A process per gate, so that an illegal access in one does not fail the others. seconds: for all of them together.
    """
    kept = out / "tests.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    results = known["gates"] if known.get("commit") == commit and known.get("device") == device else {}
    end = time.monotonic() + seconds
    for name, files in gates(tests).items():
        if results.get(name, "").startswith("ok"):
            print(f"tests of {name}: {results[name]} (before)", flush=True)
            continue
        results[name] = _pytest(files, out / "log.txt", end - time.monotonic(), device)
        print(f"tests of {name}: {results[name]}", flush=True)
        kept.write_text(json.dumps({"commit": commit, "device": device, "gates": results}, indent=1) + "\n")
    return results


def shut(op: str, results: dict[str, str]) -> str | None:
    """Why `op` may not be timed; None where all its gates are open. A gate without a file is shut, but for module's."""
    for gate in NEEDS[op]:
        status = results.get(gate, "ok: there are none" if gate == "module" else "there are none")
        if not status.startswith("ok"):
            return f"skipped: the tests of {gate}: {status}"
    return None


def _pytest(files: list[Path], log: Path, seconds: float, device: str) -> str:
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed; carry it as a wheel"
    if seconds < 2:
        return "not run: no time is left"
    # conftest.py ends the session where the CPU library is missing, on which nothing here depends
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *map(str, files)]
    if importlib.util.find_spec("xdist") is not None:  # compiling is most of the time and takes one core per test
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
    status, output = _run(command, log, seconds, environment(device))
    counts = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    if status == "ok" and " passed" in f" {counts}":
        return f"ok: {counts.strip('= ')}"
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join(filter(None, [status if status != "ok" else "none passed", counts.strip("= "), *failed[:2]]))[:400]


def _run(command: list[str], log: Path, seconds: float, extra: dict[str, str]) -> tuple[str, str]:
    """ "ok" or what went wrong, and what was printed, which is also appended to the log."""
    options = {"cwd": ROOT, "env": {**os.environ, **extra}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        try:
            output = process.communicate(timeout=seconds)[0]
            status = "ok" if process.returncode == 0 else f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
            status = f"did not end within {seconds:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{output}\n{status}\n\n")
    return status, output
