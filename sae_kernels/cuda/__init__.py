"""The host side of the CUDA C++ kernels in csrc/cuda: workspaces, matrix products and sorts around them.

Nothing here has been run on a GPU yet: the kernels are compiled for sm_80, sm_90a and sm_100, and the tests run them on
the CPU.
"""
