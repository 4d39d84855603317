"""The host side of the CUDA C++ kernels in csrc/cuda: workspaces, matrix products and sorts around them.

`sk.info()` says on which GPU each op has been checked; elsewhere the kernels are compiled for sm_80, sm_90a and sm_100,
and the tests run them on the CPU.
"""
