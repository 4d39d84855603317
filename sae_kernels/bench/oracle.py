"""The gate before every timing: results against fp64 on a sample of rows and latents, so that it stays cheap."""

import torch
from torch import Tensor

from .workload import Workload

ROWS, LATENTS, STEP_ROWS = 24, 12, 64
# largest error over the largest magnitude; narrow floats: rounding of the result
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
# whole modules in narrow floats may choose other latents, where pre-activations were rounded before the selection
MODULE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}


def check(op: str, mode: str, w: Workload, result: tuple) -> str | None:
    """What is wrong with `result`, or None. Its form is given in providers.Call."""
    if op in ("serving", "first_call"):
        op = "topk_encode"
    return _CHECKS[op, mode](w, result)


def _off(name: str, got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if got.shape != expected.shape:
        return f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return None
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return None if error <= tolerance else f"{name} is off by {error:.1e} of its largest entry"  # NaN is off too


def _rows(w: Workload) -> Tensor:
    return torch.linspace(0, w.case.rows - 1, min(ROWS, w.case.rows), device=w.device).long().unique()


def _latents(indices: Tensor) -> Tensor:
    return indices[:: max(1, len(indices) // LATENTS), 0].unique()[:LATENTS].long()


def _pre(w: Workload, rows: Tensor) -> Tensor:
    return w.x[rows].double() @ w.W_enc.double().mT + w.b_enc.double()


def _encode(w: Workload, result: tuple) -> str | None:
    rows, tolerance = _rows(w), TOLERANCE[w.case.dtype]
    pre = _pre(w, rows).relu()
    if len(result) == 1:  # dense codes
        if result[0].shape != (w.case.rows, w.case.d_sae):
            return f"codes have shape {tuple(result[0].shape)}"
        values, indices = result[0][rows].topk(w.case.k, dim=-1)
        if int((result[0][rows] != 0).sum(-1).max()) > w.case.k:
            return f"more than k = {w.case.k} latents are active in a row"
    else:
        values, indices = (t[rows] for t in result)
    expected = pre.topk(w.case.k, dim=-1).values
    got = values.double().sort(dim=-1, descending=True).values
    chosen = pre.gather(-1, indices.long())
    if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():
        return "an index stands twice in a row"
    return _off("values", got, expected, tolerance) or _off("the chosen pre-activations", values, chosen, tolerance)


def _threshold(w: Workload, result: tuple) -> str | None:
    return _above(w, result, w.threshold)


def _batch_topk(w: Workload, result: tuple) -> str | None:
    fires = result[0] > 0
    if int(fires.sum()) != w.case.rows * w.case.k:
        return f"{int(fires.sum())} latents are active, not k x rows = {w.case.rows * w.case.k}"
    return _above(w, result, result[0][fires].min().item())


def _above(w: Workload, result: tuple, threshold: float) -> str | None:
    """Codes, dense or sparse, of what is above the threshold; what is at it up to rounding may be either."""
    rows, tolerance = _rows(w), TOLERANCE[w.case.dtype]
    pre = _pre(w, rows)
    got = result[0][rows].double()
    if len(result) > 1:
        got = torch.zeros_like(pre).scatter_add(1, result[1][rows].long(), got)
    near = (pre - threshold).abs() <= tolerance * pre.abs().max()
    expected = torch.where(pre > threshold, pre, 0)
    return _off("codes", torch.where(near, 0, got), torch.where(near, 0, expected), tolerance)


def _linear(w: Workload, result: tuple) -> str | None:
    rows = _rows(w)
    return _off("the product", result[0][rows], _pre(w, rows), TOLERANCE[w.case.dtype])


def _encode_backward(w: Workload, result: tuple) -> str | None:
    dW, db, indices, fires, grad = result
    latents = _latents(indices)
    expected_W = torch.zeros(len(latents), w.case.d_in, dtype=torch.float64, device=w.device)
    expected_b = torch.zeros(len(latents), dtype=torch.float64, device=w.device)
    for i, latent in enumerate(latents):
        row, slot = ((indices == latent) & fires).nonzero(as_tuple=True)
        g = grad[row, slot].double()
        expected_W[i], expected_b[i] = g @ w.x[row].double(), g.sum()
    tolerance = TOLERANCE[w.case.dtype]
    return _off("dW_enc", dW[latents], expected_W, tolerance) or _off("db_enc", db[latents], expected_b, tolerance)


def _decode(w: Workload, result: tuple) -> str | None:
    rows = _rows(w)
    expected = (w.values[rows].double().unsqueeze(-1) * w.W_dec[w.indices[rows].long()].double()).sum(1)
    return _off("y", result[0][rows], expected, TOLERANCE[w.case.dtype])


def _decode_backward(w: Workload, result: tuple) -> str | None:
    dvalues, dW = result
    rows, latents = _rows(w), _latents(w.indices)
    tolerance = TOLERANCE[w.case.dtype]
    expected = (w.grad_out[rows].double().unsqueeze(1) * w.W_dec[w.indices[rows].long()].double()).sum(-1)
    wrong = _off("dvalues", dvalues[rows], expected, tolerance)
    expected = torch.zeros(len(latents), w.case.d_in, dtype=torch.float64, device=w.device)
    for i, latent in enumerate(latents):
        row, slot = (w.indices == latent).nonzero(as_tuple=True)
        expected[i] = w.values[row, slot].double() @ w.grad_out[row].double()
    return wrong or _off("dW_dec", dW[latents], expected, tolerance)


def _exact_forward(w: Workload) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.double().requires_grad_() for t in (w.W_enc, w.W_dec)]
    values, indices = torch.relu(w.x.double() @ leaves[0].mT + w.b_enc.double()).topk(w.case.k, dim=-1)
    return (values.unsqueeze(-1) * leaves[1][indices]).sum(1), leaves


def _module_forward(w: Workload, result: tuple) -> str | None:
    expected = _exact_forward(w)[0].detach()
    error = (result[0].double() - expected).norm() / expected.norm()
    return None if error <= MODULE_TOLERANCE[w.case.dtype] else f"x_hat is off by {error:.1e} of its norm"


def _module_step(w: Workload, result: tuple) -> str | None:
    """Gradients up to one factor: losses differ in what they divide the squared error by."""
    y, leaves = _exact_forward(w)
    expected = torch.autograd.grad((y - w.x.double()).square().sum(), leaves)
    got, wanted = (torch.cat([g.reshape(-1).double() for g in grads]) for grads in (result, expected))
    error = (got / got.norm() - wanted / wanted.norm()).norm()
    return None if error <= MODULE_TOLERANCE[w.case.dtype] else f"the gradients are off by {error:.1e} of their norm"


def _stats(w: Workload, result: tuple) -> str | None:
    counts, total, maximum = result
    flat, values = w.indices.reshape(-1).long(), w.values.reshape(-1).double()
    if not torch.equal(counts.long(), flat.bincount(minlength=w.case.d_sae)):
        return "the counts differ"
    expected = torch.zeros(w.case.d_sae, dtype=torch.float64, device=w.device).index_add_(0, flat, values)
    top = torch.full_like(expected, -torch.inf).scatter_reduce_(0, flat, values, "amax")
    seen = counts > 0
    return _off("sum", total, expected, 1e-4) or _off("max", maximum[seen], top[seen], 1e-6)


def _refit(w: Workload, result: tuple) -> str | None:
    """Most of what least squares gain over the values given, and no more."""
    rows = _rows(w)
    x, chosen = w.x[rows].double(), w.W_dec[w.indices[rows].long()].double()
    best = torch.linalg.lstsq(chosen.mT, x.unsqueeze(-1)).solution.squeeze(-1)
    start, least, found = (
        ((values.double().unsqueeze(1) @ chosen).squeeze(1) - x).square().sum(-1)
        for values in (w.values[rows], best, result[0][rows])
    )
    share = ((start - found) / (start - least)).min().item()
    return None if 0.95 <= share <= 1 + TOLERANCE[w.case.dtype] else f"{share:.1%} of what a fit gains"  # NaN is none


_CHECKS = {
    ("topk_encode", "forward"): _encode,
    ("topk_encode", "backward"): _encode_backward,
    ("sparse_decode", "forward"): _decode,
    ("sparse_decode", "backward"): _decode_backward,
    ("module", "forward"): _module_forward,
    ("module", "step"): _module_step,
    ("activation_stats", "forward"): _stats,
    ("threshold_encode", "forward"): _threshold,
    ("batch_topk_encode", "forward"): _batch_topk,
    ("refit_values", "forward"): _refit,
    ("linear", "forward"): _linear,
}
