"""Tests of the GPU's kernels: marks, and their fixture `device`. It is loaded alone where conftest.py is not."""

import os

import pytest
import torch

import sae_kernels as sk

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
KERNELS = ["cuda", *(["triton"] if ON_GPU or os.environ.get("TRITON_INTERPRET") == "1" else [])]

on_all = pytest.mark.parametrize("device", ["auto", *KERNELS], indirect=True)
on_kernels = pytest.mark.parametrize("device", KERNELS, indirect=True)


@pytest.fixture
def device(request, monkeypatch):
    """Where the backend that the test names runs its kernels; it is forced."""
    import cuda_library

    if request.param == "cuda":
        cuda_library.load()
        if cuda_library.DEVICE == "cpu":
            cuda_library.pretend(monkeypatch)
    with sk.backend(request.param):
        yield cuda_library.DEVICE if request.param == "cuda" else "cuda" if ON_GPU else "cpu"
