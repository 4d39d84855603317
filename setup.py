"""Builds the native libraries: for the CPU where torch and a C++ compiler are at hand, for CUDA where nvcc and a torch
with CUDA are too; the install succeeds without them.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
# every kernel file is compiled once per instruction set; the best one that the CPU has is chosen at run time
ISAS = {"generic": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c"]
    ISAS["avx512"].append("-mprefer-vector-width=512")
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]

# nothing in the kernels is of one generation alone; sm_90a and sm_100 let the compiler schedule for their own
CUDA_CODES = ("80", "90a", "100")
CUDA_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--threads=4"]


def torch_paths():
    """(include folders, library folders), or a reason why there are none."""
    if os.environ.get("SAE_KERNELS_NATIVE") == "0":
        return "switched off at install time by SAE_KERNELS_NATIVE=0"
    if not sys.platform.startswith("linux"):
        return f"not built: the native library is built on Linux only, this is {sys.platform}"
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return "not built: torch was not importable at install time (install torch, then use --no-build-isolation)"
    return cpp_extension.include_paths(), cpp_extension.library_paths()


def cuda_toolkit():
    """The folder of the CUDA toolkit that fits torch, or a reason why there is none."""
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
    if torch.version.cuda is None:
        return f"not built: torch {torch.__version__} has no CUDA"
    if nvcc is None:
        return "not built: there is no nvcc on PATH or in CUDA_HOME"
    # the nvcc on PATH may be a link or a script outside the toolkit
    told = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=True).stderr
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.", version)[1]
    if release != torch.version.cuda.split(".")[0]:
        return f"not built: nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}"
    return Path(re.search(r"_HERE_=(.*)", told)[1]).parent


class BuildNative(build_ext):
    user_options = [
        *build_ext.user_options,
        ("only=", None, "build one library alone: cpu or cuda"),
        ("cuda-codes=", None, f"GPU generations to compile for, separated by commas (default: {','.join(CUDA_CODES)})"),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.only, self.cuda_codes = None, ",".join(CUDA_CODES)

    def finalize_options(self):
        super().finalize_options()
        if self.only:
            self.extensions = [ext for ext in self.extensions if ext.name.endswith(self.only)]

    def run(self):
        self.reasons = {ext.name: None for ext in self.extensions}
        super().run()
        for name, reason in self.reasons.items():
            self._leave_note(Path(*name.split(".")), reason)

    def _leave_note(self, library, reason):
        note = (HERE if self.inplace else Path(self.build_lib)) / library.with_suffix(".txt")
        note.unlink(missing_ok=True)
        if reason:
            print(f"sae_kernels: {library.name} is {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            for stale in note.parent.glob(f"{library.name}*.so"):
                stale.unlink()
            note.write_text(reason + "\n")

    def build_extension(self, ext):
        paths = torch_paths()
        if isinstance(paths, str):
            self.reasons[ext.name] = paths
            return
        try:
            if ext.name.endswith("_C_cuda"):
                self.reasons[ext.name] = self._compile_cuda(ext, *paths)
            else:
                self._compile(ext, *paths)
        except Exception as error:  # no compiler, or one that is too old: the install goes on without
            self.reasons[ext.name] = f"not built: {error}"

    def _compile_cuda(self, ext, include, libraries):
        """The reason why it was not compiled, if there is one."""
        toolkit = cuda_toolkit()
        if isinstance(toolkit, str):
            return toolkit
        nvcc = toolkit / "bin" / "nvcc"
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        codes = [code for code in self.cuda_codes.split(",") if f"sm_{code.rstrip('a')}" in known]
        if not codes:
            return f"not built: {nvcc} compiles for {' '.join(known)}, none of which is among {self.cuda_codes}"
        targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
        targets.append(f"-gencode=arch=compute_{codes[0]},code=compute_{codes[0]}")  # what later GPUs translate
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            out = folder / f"{Path(source).stem}.o"
            where = ["-Icsrc", *(f"-I{path}" for path in include), "-c", source, "-o", str(out)]
            subprocess.run([nvcc, *CUDA_FLAGS, *TARGET, *targets, *where], check=True)
            return str(out)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cuda", "torch_cpu", "c10", "cudart"],
            library_dirs=[*libraries, str(toolkit / "lib64"), str(toolkit / "lib")],
            extra_postargs=["-Wl,--exclude-libs,ALL"],
            target_lang="c++",
        )
        return None

    def _compile(self, ext, include, libraries):
        have = "".join(f"-DSK_HAVE_{isa.upper()} " for isa in ISAS).split()
        jobs = [
            (source, Path(self.build_temp) / isa, [*FLAGS, *TARGET, *flags, *have, f"-DSK_ISA={isa}", *baseline])
            for isa, flags in ISAS.items()
            for baseline in [["-DSK_BASELINE"] if isa == "generic" else []]
            for source in ext.sources
        ]

        def compile_one(job):
            source, folder, flags = job
            where = {"output_dir": str(folder), "include_dirs": ["csrc", *include]}
            return self.compiler.compile([source], extra_postargs=flags, **where)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],
            library_dirs=libraries,
            extra_postargs=["-Wl,--exclude-libs,ALL"],
            target_lang="c++",
        )


class AbiWheel(bdist_wheel):
    """One wheel for every Python from 3.10: the library uses torch's stable ABI and no Python ABI at all."""

    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()


class SourcesWithTests(sdist):
    """The tests and the benchmarks go along, with all that they read."""

    def make_release_tree(self, base_dir, files):
        found = (path for folder in ("tests", "benchmarks") for path in (HERE / folder).rglob("*"))
        more = {str(path.relative_to(HERE)) for path in found if path.is_file() and path.suffix != ".pyc"}
        super().make_release_tree(base_dir, sorted({*files, *more}))


def csrc(pattern):
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob(pattern))


def extension(name, pattern):
    depends = [*csrc("**/*.h"), *csrc("**/*.cuh")]
    return Extension(f"sae_kernels.{name}", csrc(pattern), depends=depends, py_limited_api=True, optional=True)


setup(
    ext_modules=[extension("_C_cpu", "cpu/*.cpp"), extension("_C_cuda", "cuda/*.cu")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AbiWheel, "sdist": SourcesWithTests},
)
