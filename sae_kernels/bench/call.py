"""What a provider hands to the runner."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Unsupported(Exception):
    """This provider cannot do this op; the text is the reason that stands in the result row."""


class Call(NamedTuple):
    """run() is what is timed; read(its result) is what is checked, a tuple of tensors:

    topk_encode forward (values, indices) or (dense codes,), backward (dW_enc, db_enc, indices, fires, grad of values);
    sparse_decode forward (y,), backward (dvalues, dW_dec); module forward (x_hat,), step (dW_enc, dW_dec), each
    [d_sae, d_in]; activation_stats (counts, sum, max); refit_values (values,).
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple] = tuple


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()
