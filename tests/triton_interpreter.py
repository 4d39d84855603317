"""Where the Triton tests run: on the GPU where there is one, else in Triton's interpreter, which must be on from the
start.
"""

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


def patch_interpreter() -> None:
    """Sorts by NumPy, as Triton's own network takes a hundred times as long there, and bfloat16 products of the
    numbers, where the interpreter multiplies their bits.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def sort(x, dim=None, descending=False):
        ordered = np.sort(x.handle.data, axis=-1)
        if getattr(descending, "value", descending):
            ordered = np.ascontiguousarray(ordered[..., ::-1])
        return tl.core.tensor(TensorHandle(ordered, x.dtype), x.type)

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, wide(a), wide(b), *rest)

    multiply = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = create_dot
    tl.sort = sort
