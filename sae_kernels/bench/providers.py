"""The registry of providers: ours per backend, torch, torch.compile, embedding_bag, F.linear alone, the peers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sae_kernels as sk
from sae_kernels.ops._stats_gpu import update_backend
from sae_kernels.ops.refit_values import refit_values
from sae_kernels.ops.sparse_decode import backends as decoder_backends
from sae_kernels.ops.topk_encode import backends as encoder_backends

from . import peers
from .call import Call, Unsupported, leaf
from .cases import REFIT_STEPS, Case
from .workload import Workload

ISAS = ("avx512_bf16", "avx512", "avx2", "generic")


class Built(NamedTuple):
    """What a provider makes of a workload; `linear` is checked as a bare product."""

    call: Call
    check_as: str | None = None


@dataclass(frozen=True)
class Provider:
    """name and backend stand in the result rows; build(op, mode, workload) raises Unsupported with a reason.

    package: what must be installed. quick: part of the quick table. only_on: the one kind of device it is for.
    """

    name: str
    build: Callable[[str, str, Workload], Built]
    backend: str = "torch"
    package: str | None = None
    quick: bool = False
    only_on: str | None = None

    @property
    def key(self) -> str:
        return (
            self.name
            if self.backend in ("torch", "auto", "inductor") or self.package
            else f"{self.name}:{self.backend}"
        )


def _table(
    makers: dict[tuple[str, str], Callable[[Workload], Call]], missing: str
) -> Callable[[str, str, Workload], Built]:
    def build(op: str, mode: str, w: Workload) -> Built:
        maker = makers.get(("topk_encode" if op in ("serving", "first_call") else op, mode))
        if maker is None:
            raise Unsupported(missing)
        return Built(maker(w))

    return build


def _backward(outputs: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(outputs, inputs, grad, retain_graph=True)


def _encode(encode: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Workload], Call]:
    def make(w: Workload) -> Call:
        x, W, b, k = w.x, w.W_enc, w.b_enc, w.case.k
        return Call(torch.no_grad()(lambda: encode(x, W, b, k)))

    return make


def _encode_backward(encode: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Workload], Call]:
    """Gradients of the weights, as a training step needs them: x is data."""

    def make(w: Workload) -> Call:
        W, b = leaf(w.W_enc), leaf(w.b_enc)
        values, indices = encode(w.x, W, b, w.case.k)
        fires = values.detach() != 0
        return Call(_backward(values, (W, b), w.grad_values), lambda r: (*r, indices, fires, w.grad_values))

    return make


def _decode(decode: Callable[..., Tensor]) -> Callable[[Workload], Call]:
    def make(w: Workload) -> Call:
        values, indices, W, b = w.values, w.indices, w.W_dec, w.b_dec
        return Call(torch.no_grad()(lambda: decode(values, indices, W, b)), lambda y: (y,))

    return make


def _decode_backward(decode: Callable[..., Tensor]) -> Callable[[Workload], Call]:
    def make(w: Workload) -> Call:
        values, W, b = leaf(w.values), leaf(w.W_dec), leaf(w.b_dec)
        y = decode(values, w.indices, W, b)
        return Call(_backward(y, (values, W, b), w.grad_out), lambda r: r[:2])

    return make


# ours


def _our_sae(w: Workload) -> nn.Module:
    c = w.case
    sae = sk.TopKSAE(c.d_in, c.d_sae, c.k, device=w.device, dtype=w.dtype)
    peers.copy_weights(sae.W_enc, w.W_enc, sae.b_enc, w.b_enc, sae.W_dec, w.W_dec)
    return sae


def _our_step(w: Workload) -> Call:
    sae, x = _our_sae(w), w.x
    return peers.step(lambda: sae.loss(x).loss, sae, lambda: (sae.W_enc.grad, sae.W_dec.grad))


def _our_stats(w: Workload) -> Call:
    stats, values, indices = sk.ActivationStats(w.case.d_sae, device=w.device), w.values, w.indices
    return Call(lambda: stats.update(values, indices), lambda _: (stats.counts, stats.sum, stats.max))


def _slots(w: Workload) -> int:
    return min(8 * w.case.k, w.case.d_sae)


def _our_threshold_encode(w: Workload) -> Call:
    x, W, b, threshold, slots = w.x, w.W_enc, w.b_enc, w.threshold, _slots(w)
    return Call(torch.no_grad()(lambda: sk.threshold_encode(x, W, b, threshold, max_active=slots)), lambda r: r[:2])


def _our_batch_topk_encode(w: Workload) -> Call:
    x, W, b, k, slots = w.x, w.W_enc, w.b_enc, w.case.k, _slots(w)
    return Call(torch.no_grad()(lambda: sk.batch_topk_encode(x, W, b, k, max_active=slots)), lambda r: r[:2])


def _our_refit(w: Workload) -> Call:
    x, values, indices, W = w.x, w.values, w.indices, w.W_dec
    return Call(lambda: refit_values(x, values, indices, W, REFIT_STEPS), lambda fit: (fit,))


OURS = {
    ("topk_encode", "forward"): _encode(lambda x, W, b, k: sk.topk_encode(x, W, b, k)),
    ("topk_encode", "backward"): _encode_backward(lambda x, W, b, k: sk.topk_encode(x, W, b, k)),
    ("sparse_decode", "forward"): _decode(lambda v, i, W, b: sk.sparse_decode(v, i, W, b)),
    ("sparse_decode", "backward"): _decode_backward(lambda v, i, W, b: sk.sparse_decode(v, i, W, b)),
    ("module", "forward"): lambda w: peers.forward(_our_sae(w), w.x),
    ("module", "step"): _our_step,
    ("activation_stats", "forward"): _our_stats,
    ("threshold_encode", "forward"): _our_threshold_encode,
    ("batch_topk_encode", "forward"): _our_batch_topk_encode,
    ("refit_values", "forward"): _our_refit,
}


FORWARD = ("topk_encode", "threshold_encode", "batch_topk_encode", "serving", "first_call", "sparse_decode")


def ours_backend(device: str, op: str, mode: str, case: Case) -> str:
    """The backend our op takes on the device, on a CPU with its instruction set; two where a module takes two."""
    if device != "cpu":
        on = torch.device(device)
        forward, rest = encoder_backends(on)
        if op == "module":
            return forward if forward == rest else f"{forward}+{rest}"
        if op == "activation_stats":
            return update_backend(on, case.d_sae)
        if op == "sparse_decode":
            forward = decoder_backends(on, case.d_in * getattr(torch, case.dtype).itemsize)[0]
        return forward if op in FORWARD and mode == "forward" else rest
    facts = sk.info()
    return f"cpu/{facts['instruction_set']}" if facts["backend"] == "cpu" else facts["backend"]


@contextmanager
def _backend(name: str) -> Iterator[None]:
    with ExitStack() as forced:
        try:
            forced.enter_context(sk.backend(name))
        except ValueError as error:
            raise Unsupported(str(error)) from None
        yield


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    from sae_kernels import _native

    if not _native.cpu_loaded():
        raise Unsupported(f"the native library is {_native.cpu_error}")
    try:
        _native.cpu_isa(name)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    try:
        yield
    finally:
        _native.cpu_isa("auto")


def _inside(around: Callable[[str], AbstractContextManager], name: str) -> Callable[[str, str, Workload], Built]:
    """Ours, built and run inside around(name)."""
    build = _table(OURS, "no such op")

    def forced(op: str, mode: str, w: Workload) -> Built:
        with around(name):
            call = build(op, mode, w).call

        def run() -> Any:
            with around(name):
                return call.run()

        return Built(Call(run, call.read))

    return forced


# plain torch


def plain_encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(F.relu(F.linear(x, W, b)), k, dim=-1, sorted=False)
    return values, indices


def plain_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    codes = torch.zeros(values.shape[0], W.shape[0], dtype=values.dtype, device=values.device)
    return codes.scatter(1, indices.long(), values) @ W + b


def bag_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum") + b


class PlainSAE(nn.Module):
    """The TopK SAE of a textbook: linear, relu, topk, scatter, dense decode."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = map(nn.Parameter, (w.W_enc, w.b_enc, w.W_dec, w.b_dec))
        self.k = w.case.k

    def forward(self, x: Tensor) -> Tensor:
        return plain_decode(*plain_encode(x - self.b_dec, self.W_enc, self.b_enc, self.k), self.W_dec, self.b_dec)


def _compiled(f: Callable) -> Callable:
    """For this one size: what was compiled before would make sizes dynamic, and after eight of them nothing is."""
    torch._dynamo.reset()
    return torch.compile(f, dynamic=False)


def _plain_step(w: Workload, compiled: bool = False) -> Call:
    sae, x = PlainSAE(w), w.x

    def loss() -> Tensor:
        return (sae(x) - x).square().sum() / x.shape[0]

    return peers.step(_compiled(loss) if compiled else loss, sae, lambda: (sae.W_enc.grad, sae.W_dec.grad))


def _plain_stats(w: Workload) -> Call:
    values, indices, d_sae = w.values, w.indices, w.case.d_sae

    def run() -> tuple[Tensor, ...]:
        flat, v = indices.reshape(-1).long(), values.reshape(-1).double()
        zeros = torch.zeros(d_sae, dtype=torch.float64, device=v.device)
        total, squares = zeros.index_add(0, flat, v), zeros.index_add(0, flat, v * v)
        top = torch.full_like(zeros, -torch.inf).scatter_reduce_(0, flat, v, "amax")
        row = torch.arange(len(indices), device=v.device).unsqueeze(1).expand_as(indices).reshape(-1)
        last = torch.full((d_sae,), -1, device=v.device).scatter_reduce_(0, flat, row, "amax")
        return flat.bincount(minlength=d_sae), total, top, squares, last

    return Call(run, lambda r: r[:3])


def _plain_threshold_encode(w: Workload) -> Call:
    """The dense codes, as plain torch has them."""
    x, W, b, threshold = w.x, w.W_enc, w.b_enc, w.threshold

    def run() -> Tensor:
        pre = F.linear(x, W, b)
        return pre * (pre > threshold)

    return Call(torch.no_grad()(run), lambda codes: (codes,))


def _plain_batch_topk_encode(w: Workload) -> Call:
    x, W, b, k = w.x, w.W_enc, w.b_enc, w.case.k

    def run() -> Tensor:
        pre = F.relu(F.linear(x, W, b))
        best = pre.flatten().topk(k * len(x), sorted=False)
        return torch.zeros_like(pre).view(-1).scatter_(0, best.indices, best.values).view_as(pre)

    return Call(torch.no_grad()(run), lambda codes: (codes,))


def _plain_refit(w: Workload) -> Call:
    """The whole fit, by the normal equations of every row."""
    x, indices, W, acc = w.x, w.indices, w.W_dec, torch.promote_types(w.dtype, torch.float32)

    def run() -> Tensor:
        chosen = W[indices.long()].to(acc)
        return torch.linalg.solve(chosen @ chosen.mT, chosen @ x.to(acc).unsqueeze(-1)).squeeze(-1).to(x.dtype)

    return Call(torch.no_grad()(run), lambda fit: (fit,))


TORCH = {
    ("topk_encode", "forward"): _encode(plain_encode),
    ("topk_encode", "backward"): _encode_backward(plain_encode),
    ("sparse_decode", "forward"): _decode(plain_decode),
    ("sparse_decode", "backward"): _decode_backward(plain_decode),
    ("module", "forward"): lambda w: peers.forward(PlainSAE(w), w.x),
    ("module", "step"): _plain_step,
    ("activation_stats", "forward"): _plain_stats,
    ("threshold_encode", "forward"): _plain_threshold_encode,
    ("batch_topk_encode", "forward"): _plain_batch_topk_encode,
    ("refit_values", "forward"): _plain_refit,
}
COMPILED = {
    ("topk_encode", "forward"): lambda w: _encode(_compiled(plain_encode))(w),
    ("sparse_decode", "forward"): lambda w: _decode(_compiled(plain_decode))(w),
    ("module", "forward"): lambda w: peers.forward(_compiled(PlainSAE(w)), w.x),
    ("module", "step"): lambda w: _plain_step(w, compiled=True),
}
BAG = {("sparse_decode", "forward"): _decode(bag_decode), ("sparse_decode", "backward"): _decode_backward(bag_decode)}


def _linear(op: str, mode: str, w: Workload) -> Built:
    if op not in ("topk_encode", "serving", "first_call") or mode != "forward":
        raise Unsupported("a floor of the encoder's forward alone")
    x, W, b = w.x, w.W_enc, w.b_enc
    return Built(Call(torch.no_grad()(lambda: F.linear(x, W, b)), lambda y: (y,)), "linear")


def _providers() -> dict[str, Provider]:
    found = [
        Provider("sae_kernels", _table(OURS, "no such op"), "auto", quick=True),
        Provider("torch", _table(TORCH, "not an op of torch"), quick=True),
        Provider("linear", _linear, quick=True),
        Provider("embedding_bag", _table(BAG, "a decoder alone"), quick=True),
        Provider("torch_compile", _table(COMPILED, "not compiled: the eager figures stand under torch"), "inductor"),
        *(
            Provider(name, _table(makers, "its public API has no such call"), "torch", package)
            for name, package, makers in peers.PEERS
        ),
        *(Provider("sae_kernels", _inside(_instruction_set, isa), f"cpu/{isa}", only_on="cpu") for isa in ISAS),
        *(Provider("sae_kernels", _inside(_backend, name), name, only_on="cuda") for name in ("triton", "cuda")),
        Provider("sae_kernels", _inside(_backend, "reference"), "reference"),
    ]
    return {provider.key: provider for provider in found}


PROVIDERS = _providers()
