"""Other SAE libraries, each called through its public API as a user installs it (extra `peers`)."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .call import Call, Unsupported, leaf
from .workload import Workload


@torch.no_grad()
def copy_weights(*pairs: Tensor) -> None:
    """copy_weights(to, from, to, from, ...)."""
    for target, source in zip(pairs[::2], pairs[1::2], strict=True):
        target.copy_(source)


def forward(sae: nn.Module, x: Tensor, read: Callable = lambda y: (y,)) -> Call:
    return Call(torch.no_grad()(lambda: sae(x)), read)


def step(loss: Callable[[], Tensor], sae: nn.Module, grads: Callable[[], tuple[Tensor, Tensor]]) -> Call:
    """Forward and backward without the optimiser; gradients are made anew each time."""

    def run() -> None:
        sae.zero_grad(set_to_none=True)
        loss().backward()

    return Call(run, lambda _: tuple(g.detach() for g in grads()))


# eai-sparsify


# its documented switch, which it reads when imported: its Triton decoder needs a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")


def _sparsify_encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from sparsify.fused_encoder import fused_encoder

    out = fused_encoder(x, W, b, k, "topk")
    return out.top_acts, out.top_indices


def _sparsify_encode_forward(w: Workload) -> Call:
    return Call(torch.no_grad()(lambda: _sparsify_encode(w.x, w.W_enc, w.b_enc, w.case.k)))


def _sparsify_encode_backward(w: Workload) -> Call:
    W, b = leaf(w.W_enc), leaf(w.b_enc)
    values, indices = _sparsify_encode(w.x, W, b, w.case.k)
    run = lambda: torch.autograd.grad(values, (W, b), w.grad_values, retain_graph=True)  # noqa: E731
    return Call(run, lambda r: (*r, indices, values.detach() != 0, w.grad_values))


def _sparsify_decode(w: Workload) -> Call:
    sae = _sparsify_sae(w)
    return Call(torch.no_grad()(lambda: sae.decode(w.values, w.indices)), lambda y: (y,))


def _sparsify_decode_backward(w: Workload) -> Call:
    sae, values = _sparsify_sae(w), leaf(w.values)
    y = sae.decode(values, w.indices)
    inputs = (values, sae.W_dec, sae.b_dec)
    return Call(lambda: torch.autograd.grad(y, inputs, w.grad_out, retain_graph=True), lambda r: r[:2])


def _sparsify_sae(w: Workload) -> nn.Module:
    import sparsify

    c = w.case
    sae = sparsify.Sae(c.d_in, sparsify.SaeConfig(num_latents=c.d_sae, k=c.k), w.device, w.dtype)
    copy_weights(sae.encoder.weight, w.W_enc, sae.encoder.bias, w.b_enc, sae.W_dec, w.W_dec, sae.b_dec, w.b_dec)
    return sae


def _sparsify_step(w: Workload) -> Call:
    sae, x = _sparsify_sae(w), w.x
    return step(lambda: sae(x).fvu, sae, lambda: (sae.encoder.weight.grad, sae.W_dec.grad))


# sae-lens


def _lens_sae(w: Workload, training: bool) -> nn.Module:
    import sae_lens

    c = w.case
    config = {"d_in": c.d_in, "d_sae": c.d_sae, "k": c.k, "dtype": c.dtype, "device": str(w.device)}
    if training:
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**config))
    else:
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**config))
    copy_weights(sae.W_enc, w.W_enc.mT, sae.b_enc, w.b_enc, sae.W_dec, w.W_dec, sae.b_dec, w.b_dec)
    return sae


def _lens_encode(w: Workload) -> Call:
    sae = _lens_sae(w, training=False)
    return Call(torch.no_grad()(lambda: sae.encode(w.x)), lambda codes: (codes,))


def _dense_codes(w: Workload) -> Tensor:
    return torch.zeros(w.case.rows, w.case.d_sae, dtype=w.dtype, device=w.device).scatter(1, w.indices.long(), w.values)


def _lens_decode(w: Workload) -> Call:
    sae, codes = _lens_sae(w, training=False), _dense_codes(w)
    return Call(torch.no_grad()(lambda: sae.decode(codes)), lambda y: (y,))


def _lens_step(w: Workload) -> Call:
    try:
        from sae_lens.saes.sae import TrainStepInput
    except ImportError as error:
        raise Unsupported(f"this version has no TrainStepInput: {error}") from None
    sae = _lens_sae(w, training=True)
    parts = {
        "sae_in": w.x,
        "coefficients": {},
        "dead_neuron_mask": None,
        "n_training_steps": 0,
        "is_logging_step": False,
    }
    given = TrainStepInput(**parts)
    return step(lambda: sae.training_forward_pass(given).loss, sae, lambda: (sae.W_enc.grad.mT, sae.W_dec.grad))


# dictionary-learning


def _dictionary_trainer(w: Workload):
    from dictionary_learning.trainers.top_k import TopKTrainer

    c = w.case
    trainer = TopKTrainer(100_000, c.d_in, c.d_sae, c.k, layer=0, lm_name="none", device=str(w.device))
    ae = trainer.ae.to(w.dtype)
    copy_weights(ae.encoder.weight, w.W_enc, ae.encoder.bias, w.b_enc, ae.decoder.weight, w.W_dec.mT, ae.b_dec, w.b_dec)
    return trainer


def _dictionary_encode(w: Workload) -> Call:
    ae = _dictionary_trainer(w).ae
    return Call(torch.no_grad()(lambda: ae.encode(w.x, return_topk=True)), lambda r: (r[1], r[2]))


def _dictionary_decode(w: Workload) -> Call:
    ae, codes = _dictionary_trainer(w).ae, _dense_codes(w)
    return Call(torch.no_grad()(lambda: ae.decode(codes)), lambda y: (y,))


def _dictionary_step(w: Workload) -> Call:
    trainer = _dictionary_trainer(w)
    ae = trainer.ae
    return step(lambda: trainer.loss(w.x, step=0), ae, lambda: (ae.encoder.weight.grad, ae.decoder.weight.grad.mT))


# overcomplete


def _overcomplete_sae(w: Workload, training: bool = False) -> nn.Module:
    from overcomplete.sae import TopKSAE

    c = w.case
    sae = TopKSAE(c.d_in, c.d_sae, top_k=c.k, device=w.device).to(w.dtype)
    linears = [m for m in sae.encoder.modules() if isinstance(m, nn.Linear)]
    if len(linears) != 1:
        raise Unsupported(f"its default encoder has {len(linears)} linear layers, not one")
    copy_weights(linears[0].weight, w.W_enc, linears[0].bias, w.b_enc)
    copy_weights(next(sae.dictionary.parameters()), w.W_dec)
    return sae.train(training)


def _overcomplete_encode(w: Workload) -> Call:
    sae = _overcomplete_sae(w)
    return Call(torch.no_grad()(lambda: sae.encode(w.x)), lambda r: (r[1],))


def _overcomplete_decode(w: Workload) -> Call:
    sae, codes = _overcomplete_sae(w), _dense_codes(w)
    return Call(torch.no_grad()(lambda: sae.decode(codes)), lambda y: (y,))


def _overcomplete_step(w: Workload) -> Call:
    sae, x = _overcomplete_sae(w, training=True), w.x
    linear = next(m for m in sae.encoder.modules() if isinstance(m, nn.Linear))
    weights = next(sae.dictionary.parameters())
    return step(lambda: F.mse_loss(sae(x)[2], x), sae, lambda: (linear.weight.grad, weights.grad))


# provider, package that must be installed, (op, mode) -> maker
PEERS = (
    (
        "eai_sparsify",
        "sparsify",
        {
            ("topk_encode", "forward"): _sparsify_encode_forward,
            ("topk_encode", "backward"): _sparsify_encode_backward,
            ("sparse_decode", "forward"): _sparsify_decode,
            ("sparse_decode", "backward"): _sparsify_decode_backward,
            ("module", "forward"): lambda w: forward(_sparsify_sae(w), w.x, lambda out: (out.sae_out,)),
            ("module", "step"): _sparsify_step,
        },
    ),
    (
        "sae_lens",
        "sae_lens",
        {
            ("topk_encode", "forward"): _lens_encode,
            ("sparse_decode", "forward"): _lens_decode,
            ("module", "forward"): lambda w: forward(_lens_sae(w, training=False), w.x),
            ("module", "step"): _lens_step,
        },
    ),
    (
        "dictionary_learning",
        "dictionary_learning",
        {
            ("topk_encode", "forward"): _dictionary_encode,
            ("sparse_decode", "forward"): _dictionary_decode,
            ("module", "forward"): lambda w: forward(_dictionary_trainer(w).ae, w.x),
            ("module", "step"): _dictionary_step,
        },
    ),
    (
        "overcomplete",
        "overcomplete",
        {
            ("topk_encode", "forward"): _overcomplete_encode,
            ("sparse_decode", "forward"): _overcomplete_decode,
            ("module", "forward"): lambda w: forward(_overcomplete_sae(w), w.x, lambda out: (out[2],)),
            ("module", "step"): _overcomplete_step,
        },
    ),
)
