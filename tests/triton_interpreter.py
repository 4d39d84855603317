"""Where the Triton tests run: on the GPU where there is one, else in Triton's interpreter, which must be on from the start."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def need_a_place_to_run() -> None:
    """Skips the calling module where neither is there."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("no GPU; test_triton_interpreted.py runs this file in the interpreter", allow_module_level=True)


def sort_by_numpy() -> None:
    """Sorts in the interpreter by NumPy: Triton's own network takes a hundred times as long there."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x, dim=None, descending=False):
        ordered = np.sort(x.handle.data, axis=-1)
        if getattr(descending, "value", descending):
            ordered = np.ascontiguousarray(ordered[..., ::-1])
        return tl.core.tensor(TensorHandle(ordered, x.dtype), x.type)

    tl.sort = sort
