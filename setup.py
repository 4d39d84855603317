"""Builds the native CPU library where torch and a C++ compiler are at hand; the install succeeds without them too."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

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


class BuildNative(build_ext):
    def run(self):
        self.reason = None
        super().run()
        if self.reason:
            print(f"sae_kernels: pure Python install; the native library is {self.reason}", file=sys.stderr)
        target = HERE if self.inplace else Path(self.build_lib)
        note = target / "sae_kernels" / "_native_build.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        if self.reason:
            for stale in note.parent.glob("_C_cpu*.so"):
                stale.unlink()
            note.write_text(self.reason + "\n")
        else:
            note.unlink(missing_ok=True)

    def build_extension(self, ext):
        paths = torch_paths()
        if isinstance(paths, str):
            self.reason = paths
            return
        try:
            self._compile(ext, *paths)
        except Exception as error:  # no compiler, or one that is too old: the install goes on in pure Python
            self.reason = f"not built: {error}"

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

        from concurrent.futures import ThreadPoolExecutor

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


def csrc(pattern):
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob(pattern))


setup(
    ext_modules=[
        Extension("sae_kernels._C_cpu", csrc("cpu/*.cpp"), depends=csrc("**/*.h"), py_limited_api=True, optional=True)
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AbiWheel},
)
