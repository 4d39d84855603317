"""Triton kernels, one file per op: checked in Triton's interpreter, compiled ahead of time for sm_80, sm_90, sm_100."""
