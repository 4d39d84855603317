"""What has to hold before anything is timed: the native libraries are built and every GPU test passes."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# op -> the gates that must be open before it is timed
NEEDS = {
    "topk_encode": ("topk_encode",),
    "sparse_decode": ("sparse_decode",),
    "module": ("topk_encode", "sparse_decode", "sae_loss", "module"),
    "activation_stats": ("activation_stats",),
    "threshold_encode": ("threshold_encode",),
    "batch_topk_encode": ("threshold_encode", "batch_topk_encode"),
    "serving": ("topk_encode",),
    "first_call": ("topk_encode",),
}
# conftest.py ends the session where the CPU library is missing, on which nothing here depends
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-p", "kernel_device")
SANITIZER, SANITIZER_TOOLS = "compute-sanitizer", ("memcheck", "racecheck")
SMALL = "ties or adversarial or guess or thresholds or exact or chunks or rounding or examples or one_digit"  # tests
BUILD_SECONDS = 240
GRACE_SECONDS = 8


def gates(tests: Path) -> dict[str, list[Path]]:
    """Gate -> its test files: test_triton_<op>.py, test_cuda_<op>.py and test_gpu_<op>.py, also with more after the op;
    a test_gpu file of no op belongs to module.
    """
    ops = [path.stem for path in (ROOT / "sae_kernels" / "ops").glob("[a-z]*.py")]
    found: dict[str, list[Path]] = {}
    for path in sorted(path for kind in ("triton", "cuda", "gpu") for path in tests.glob(f"test_{kind}_*.py")):
        kind, name = re.fullmatch(r"test_(triton|cuda|gpu)_(\w+)", path.stem).groups()
        op = next((op for op in ops if name == op or name.startswith(f"{op}_")), None)
        if op or kind == "gpu":
            found.setdefault(op or "module", []).append(path)
    return found


def environment(device: str) -> dict[str, str]:
    """What a process needs so that the Triton kernels run on the device: the interpreter for a rehearsal on the CPU."""
    return {} if device != "cpu" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def tests_path() -> dict[str, str]:
    """What a process needs to find the modules of tests/."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))}


def build(log: Path, device: str) -> str:
    """Builds the library that the device needs in place, for that GPU alone; "ok", or why not. Triton needs none."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if device == "cpu":
        return _run([*command, "--only=cpu"], log, BUILD_SECONDS, {})[0]
    code = "{}{}".format(*torch.cuda.get_device_capability(device))
    code += "a" if code == "90" else ""
    status, output = _run([*command, "--only=cuda", f"--cuda-codes={code}"], log, BUILD_SECONDS, {})
    unbuilt = re.search(r"_C_cuda is (not built.*)", output)
    if unbuilt:
        return unbuilt[1]
    return status if status == "ok" else f"{status}: {output.strip().splitlines()[-1] if output.strip() else ''}"


def run_tests(
    device: str, out: Path, commit: str, seconds: float, tests: Path, ops: tuple[str, ...] = ()
) -> dict[str, str]:
    """Gate -> "ok: ..." or why it stays shut, of these ops, if any are named. Gates that were open for this commit in
    out/tests.json are not run again.

    All gates at once, as compiling is most of their time; a process for each, so that an illegal access in one does
    not fail the others. seconds: until the last one is stopped.
    """
    kept = out / "tests.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    results = known["gates"] if known.get("commit") == commit and known.get("device") == device else {}
    wanted = {gate for op in ops for gate in NEEDS[op]}
    found = {name: files for name, files in gates(tests).items() if name in wanted or not ops}
    for name in found:
        if results.get(name, "").startswith("ok"):
            print(f"tests of {name}: {results[name]} (before)", flush=True)
    waiting = {name: files for name, files in found.items() if not results.get(name, "").startswith("ok")}
    workers = max(1, (os.cpu_count() or 1) // (2 if len(waiting) <= 3 else 3))  # for the few gates that take long
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        running = {
            pool.submit(_pytest, files, out / "log.txt", seconds, device, workers): name
            for name, files in waiting.items()
        }
        for done in as_completed(running):
            name = running[done]
            results[name] = done.result()
            print(f"tests of {name}: {results[name]}", flush=True)
            kept.write_text(json.dumps({"commit": commit, "device": device, "gates": results}, indent=1) + "\n")
    return results


def sanitize(out: Path, deadline: float, tests: Path, ops: tuple[str, ...] = ()) -> dict[str, str]:
    """Tool of compute-sanitizer -> "ok: ..." or what it found, over the small cases of the CUDA C++ kernels."""
    if shutil.which(SANITIZER) is None:
        missing = f"not run: there is no {SANITIZER} on PATH"
        print(f"{', '.join(SANITIZER_TOOLS)}: {missing}", flush=True)
        return dict.fromkeys(SANITIZER_TOOLS, missing)
    wanted = {gate for op in ops for gate in NEEDS[op]}
    files = [
        path
        for gate, paths in gates(tests).items()
        for path in paths
        if path.stem.startswith("test_cuda_") and (gate in wanted or not ops)
    ]
    found = {}
    for place, tool in enumerate(SANITIZER_TOOLS):
        share = (deadline - time.time()) / (len(SANITIZER_TOOLS) - place)
        before = (SANITIZER, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        found[tool] = _pytest(files, out / "log.txt", share, "cuda", 1, before, ("-k", SMALL))
        print(f"{tool}: {found[tool]}", flush=True)
    return found


def shut(op: str, results: dict[str, str]) -> str | None:
    """Why `op` may not be timed; None where all its gates are open. A gate without a file is shut, but for module's."""
    for gate in NEEDS[op]:
        status = results.get(gate, "ok: there are none" if gate == "module" else "there are none")
        if not status.startswith("ok"):
            return f"skipped: the tests of {gate}: {status}"
    return None


def _pytest(
    files: list[Path],
    log: Path,
    seconds: float,
    device: str,
    workers: int,
    before: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> str:
    """before: what the command is an argument of; more: of its own."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed; carry it as a wheel"
    if seconds < 2:
        return "not run: no time is left"
    command = [*before, *PYTEST, *map(str, files), *more]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    status, output = _run(command, log, seconds, environment(device) | tests_path())
    counts = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    if status == "ok" and " passed" in f" {counts}":
        return f"ok: {counts.strip('= ')}"
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join(filter(None, [status if status != "ok" else "none passed", counts.strip("= "), *failed[:2]]))[:400]


def _stopped(process: subprocess.Popen) -> str:
    """What it printed: pytest, when interrupted, still tells of the failures so far."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers of pytest-xdist too: they hold the pipe open
        return process.communicate()[0]


def _run(command: list[str], log: Path, seconds: float, extra: dict[str, str]) -> tuple[str, str]:
    """ "ok" or what went wrong, and what was printed, which is also appended to the log."""
    options = {"cwd": ROOT, "env": {**os.environ, **extra}, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        try:
            output = process.communicate(timeout=seconds)[0]
            status = "ok" if process.returncode == 0 else f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            output = _stopped(process)
            status = f"did not end within {seconds:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{output}\n{status}\n\n")
    return status, output
