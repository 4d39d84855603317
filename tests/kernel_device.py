"""Marks of tests of the GPU's kernels: their fixture `device` is where those of the backend run on this machine."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
KERNELS = ["cuda", *(["triton"] if ON_GPU or os.environ.get("TRITON_INTERPRET") == "1" else [])]

on_all = pytest.mark.parametrize("device", ["auto", *KERNELS], indirect=True)
on_kernels = pytest.mark.parametrize("device", KERNELS, indirect=True)
