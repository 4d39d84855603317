"""Triton kernels, one file per op. Nothing here has been run on a GPU yet: checked in Triton's interpreter, compiled
for sm_80/90/100.
"""
