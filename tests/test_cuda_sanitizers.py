"""Every CUDA kernel, run on the CPU by tests/cuda_host under ThreadSanitizer and AddressSanitizer; and proof that they
find what they are there for.
"""

import os
import shutil
import subprocess

import cuda_library
import pytest


def run(sanitizer, csrc, folder) -> subprocess.CompletedProcess:
    """Compiles tests/cuda_host/main.cpp over the kernels in `csrc` and runs it."""
    program = folder / "main"
    flags = [*cuda_library.FLAGS, f"-fsanitize={sanitizer}", "-O0", "-g1", "-Wno-unused-function", f"-I{csrc}"]
    build = [cuda_library.compiler(), *flags, cuda_library.HOST / "main.cpp", "-o", program]
    built = subprocess.run(build, capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0 and not built.stderr, built.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_kernels_are_clean(tmp_path, sanitizer):
    done = run(sanitizer, cuda_library.ROOT / "csrc", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FAULTS = {
    "no __syncthreads before the sum over warps": (
        "thread",
        "if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = warp;\n  __syncthreads();",
        "if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = warp;",
        "data race",
    ),
    "no __syncwarp between the steps of the sort": (
        "thread",
        "      team_sync<P>();\n      for (int pair",
        "      for (int pair",
        "data race",
    ),
    "reads beyond the last column": (
        "address",
        "row + (column < a.columns ? column : 0)",
        "row + column",
        "heap-buffer-overflow",
    ),
    "writes beyond the buffer in shared memory": (
        "address",
        "if (!__any_sync(kAllLanes, used > (kLaneEntries - V) * kStep)) return true;",
        "if (true) return true;",
        "global-buffer-overflow",
    ),
    "no wait for a tile's weights": (
        "thread",
        "    shared.full[stream.stage].wait(stream.round % 2);\n",
        "",
        "data race",
    ),
    "gives weights back that are still multiplied": (
        "thread",
        "    await_products<1>();\n    __syncwarp();  // of all lanes\n",
        "    __syncwarp();  // of all lanes\n",
        "data race",
    ),
    "moves entries that another lane has not read yet": (
        "thread",
        "    __syncwarp();  // all lanes have read theirs\n",
        "",
        "data race",
    ),
    "latents fill up before all that passed are marked": (
        "thread",
        "    if (latent < a.k) atomicOr(taken + latent / kWarp, 1u << latent % kWarp);\n  }\n  __syncwarp();\n",
        "    if (latent < a.k) atomicOr(taken + latent / kWarp, 1u << latent % kWarp);\n  }\n",
        "data race",
    ),
    "no __syncthreads before the table is read": (
        "thread",
        "  __syncthreads();\n  for (int slot",
        "  for (int slot",
        "data race",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_put_into_a_kernel_is_found(tmp_path, fault):
    sanitizer, right, wrong, message = FAULTS[fault]
    csrc = shutil.copytree(cuda_library.ROOT / "csrc", tmp_path / "csrc")
    texts = {kernel: kernel.read_text() for kernel in (csrc / "cuda").glob("*.cuh")}
    assert sum(text.count(right) for text in texts.values()) == 1
    for kernel, text in texts.items():
        kernel.write_text(text.replace(right, wrong))
    done = run(sanitizer, csrc, tmp_path)
    assert done.returncode != 0 and message in done.stderr
