"""batch_topk_encode: the k x rows largest latents of a whole batch (Bussmann et al. 2024), exact and differentiable."""

import torch
from torch import Tensor

from . import _autocast, _checks, reference
from ._backend import cuda_or
from ._rows import as_rows
from .threshold_encode import counted_backward, save_for_counted_backward, threshold_with
from .topk_encode import ACTIVATIONS, backends, check_encoder, topk_with

_SAMPLE, _MARGIN = 64, 1.3  # rows of the guess, and how many more candidates than needed it aims at
_SAMPLE_ON_GPU, _FEWEST_ON_GPU = 512, 2048  # there, and rows of the smallest batch that is guessed at

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define(
    "batch_topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, int k, int max_active, str activation,"
    " Tensor? latent_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("batch_keep(Tensor values, Tensor counts, int total, bool magnitude) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("sae_kernels::batch_topk_encode", lib=_lib)
def _forward_fake(x, W_enc, b_enc, k, max_active, activation, latent_mask, backend):
    values = x.new_empty(x.shape[0], max_active, dtype=reference.accumulator(x.dtype))
    indices = values.new_empty(values.shape, dtype=torch.int32)
    return values, indices, indices.new_empty(x.shape[0]), values.new_empty(())


@torch.library.register_fake("sae_kernels::batch_keep", lib=_lib)
def _keep_fake(values, counts, total, magnitude):
    return values.new_empty(values.shape), counts.new_empty(counts.shape), values.new_empty(())


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    max_active: int | None = None,
    activation: str = "relu",
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k x rows largest entries of activation(x W_enc^T + b_enc) over the whole batch, none of them 0 under relu.

    x [..., d_in]; W_enc [d_sae, d_in]; b_enc [d_sae] or None; all of one dtype: float32, float64, bfloat16 or float16.
    k: 1 to d_sae, the entries per row on average. activation, latent_mask: as in topk_encode. max_active: 1 to d_sae,
    the most that one row may contribute (default: 4 k); the choice is among every row's max_active strongest, and with
    max_active = d_sae nothing is left out beforehand.

    Returns values [..., max_active] in x's dtype, indices [..., max_active] int32, counts [...] int32 (how many of the
    row's slots are chosen; they stand first, strongest first) and threshold [] in float32 (float64 for float64): the
    lowest chosen score, 0 where nothing is chosen, which BatchTopK averages for inference with threshold_encode. Equal
    scores stand by the lower row, then by the lower index. NaN ranks highest; -inf is never chosen. The other slots
    hold value 0 and latents of no meaning: valid, and distinct within a row.

    Differentiable once in x, W_enc and b_enc; chosen on pre-activations accumulated in float32. A first guess of the
    threshold from some of the rows makes the pass over all rows cheap, on CPU and, in CUDA C++, where the kernel of
    short rows takes the batch; should too few entries pass it, the pass is made again without. Workspace: as
    topk_encode with k = max_active; on CPU 4 bytes per candidate, in CUDA C++ 16 a row, elsewhere what the sorting of
    all rows x max_active scores takes. The kernels on a GPU wait for nothing.

    Under autocast, tensors of different floating dtypes are brought to W_enc's. Raises TypeError or ValueError that
    names the argument, before any work.
    """
    x_dtype = x.dtype if isinstance(x, Tensor) else None
    x, b_enc = _autocast.widened(W_enc, x, b_enc)
    check_encoder("batch_topk_encode", x, W_enc, b_enc, activation, latent_mask, k=k)
    if max_active is None:
        max_active = min(4 * k, W_enc.shape[0])
    _checks.integer("batch_topk_encode", "max_active", max_active, 1, W_enc.shape[0])
    run = _BatchTopKEncode.apply if _checks.needs_grad(x, W_enc, b_enc) else _BatchTopKEncode.forward
    flat = as_rows(x)
    values, indices, counts, threshold = run(
        flat, W_enc, b_enc, k, max_active, activation, latent_mask, backends(x.device)
    )
    shape = (*x.shape[:-1], max_active)
    return values.reshape(shape).to(x_dtype), indices.reshape(shape), counts.reshape(shape[:-1]), threshold


def _choose(x, W_enc, b_enc, k, max_active, activation, latent_mask, backend):
    total, magnitude = k * x.shape[0], activation == "abs"
    arguments = (max_active, activation, latent_mask)
    rows = x.shape[0]
    lowest = torch.full((1,), _floor(activation), dtype=reference.accumulator(x.dtype), device=x.device)
    if backend != "cpu":
        found = _guessed_on_gpu(x, W_enc, b_enc, k, lowest, *arguments) if backend == "cuda" else None
        if found is None:  # a guess that was too high would be known only to who waits for the GPU
            found = threshold_with(backend, x, W_enc, b_enc, lowest, *arguments)
        values, counts, threshold = _keep_on_gpu(found[0], found[2], total, magnitude)
        return values, found[1], counts, threshold
    sample = x[:: rows // max(_SAMPLE, rows // 32) | 1]
    limit = torch.maximum(_guess(sample, W_enc, b_enc, k, *arguments, backend).to(lowest), lowest)
    values, indices, counts = threshold_with(backend, x, W_enc, b_enc, limit, *arguments)
    if counts.clamp(max=max_active).sum() < total and limit > lowest:
        values, indices, counts = threshold_with(backend, x, W_enc, b_enc, lowest, *arguments)
    values, counts, threshold = torch.ops.sae_kernels.batch_keep(values, counts, total, magnitude)
    return values, indices, counts, threshold


def _keep_by_cuda(values: Tensor, counts: Tensor, total: int, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    from ..cuda import batch_topk_encode as kernel

    return kernel.batch_keep(values, counts, total, magnitude)


_keep_in_float32 = cuda_or(_keep_by_cuda, reference.batch_keep)


def _keep_on_gpu(values: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    return (_keep_in_float32 if values.dtype == torch.float32 else reference.batch_keep)(values, *args)


def _floor(activation: str) -> float:
    return -torch.inf if activation == "none" else 0.0


def _guessed_by_cuda(x, W_enc, b_enc, k, lowest, max_active, activation, latent_mask):
    """Candidates by a kernel that repeats a guess that was too high without being waited for; None where it cannot."""
    from ..cuda import threshold_encode as kernel

    rows, code = x.shape[0], ACTIVATIONS.index(activation)
    if rows < _FEWEST_ON_GPU or not kernel.takes_twice(x, W_enc, max_active, code, latent_mask):
        return None
    with _autocast.switched_off(x.device):
        sample = x[:: rows // _SAMPLE_ON_GPU | 1]  # an odd step meets every place of rows that come in powers of two
        guess = _guess(sample, W_enc, b_enc, k, min(max_active, 4 * k), activation, None, "cuda")
        limit = torch.maximum(guess.to(lowest), lowest)
        return kernel.threshold_encode_twice(x, W_enc, b_enc, limit, lowest, k * rows, max_active, code)


_guessed_on_gpu = cuda_or(_guessed_by_cuda, lambda *_: None)


def _guess(sample, W_enc, b_enc, k, max_active, activation, latent_mask, backend) -> Tensor:
    """[1]: what somewhat more than k entries per row are above, as far as an even sample of the rows tells."""
    values, _ = topk_with(backend, sample, W_enc, b_enc, max_active, activation, latent_mask)
    score = (values.abs() if activation == "abs" else values).flatten()
    place = int(_MARGIN * k * sample.shape[0]) + 1
    if place > score.numel():
        return score.new_full((1,), -torch.inf)
    return score.kthvalue(score.numel() - place + 1).values.nan_to_num(nan=-torch.inf, posinf=torch.inf).reshape(1)


_lib.impl("batch_topk_encode", _choose, "CompositeExplicitAutograd")


class _BatchTopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(x, W_enc, b_enc, k, max_active, activation, latent_mask, backends):
        backend, _ = backends
        if backend == "reference":
            with _autocast.switched_off(x.device):
                return reference.batch_topk_encode(x, W_enc, b_enc, k, max_active, activation, latent_mask)
        op = torch.ops.sae_kernels.batch_topk_encode.default
        return op(x, W_enc, b_enc, k, max_active, activation, latent_mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_for_counted_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, *_):
        return *counted_backward(ctx, grad_values), *[None] * 5
