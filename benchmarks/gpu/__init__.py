"""The kernels on a GPU: built, tested, timed, tuned, profiled on a bare machine. `python -m benchmarks.gpu --help`."""
