"""`python -m benchmarks.report` makes README.md's tables and the plots anew from benchmarks/results/<device>/*.csv."""

from pathlib import Path

from sae_kernels.bench.report import write

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    changed = write(ROOT)
    for path in changed:
        print(f"wrote {path.relative_to(ROOT)}")
    if not changed:
        print("README.md and the plots agree with the CSV files")
