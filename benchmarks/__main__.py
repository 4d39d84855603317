"""`python -m benchmarks ...` is `sae-kernels bench ...`."""

import sys

from sae_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
