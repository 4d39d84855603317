"""CUDA graphs of encode, decode, statistics and a whole training step; in the interpreter, that no launch path asks the
device for a number.
"""

from collections.abc import Callable

import pytest
import torch
from triton_interpreter import DEVICE, INTERPRETED, need_a_place_to_run, patch_interpreter

need_a_place_to_run()

import sae_kernels as sk  # noqa: E402
from sae_kernels import _native  # noqa: E402
from sae_kernels.cuda import topk_encode as cuda_kernel  # noqa: E402
from sae_kernels.kernels import topk_encode as kernel  # noqa: E402

if INTERPRETED:
    patch_interpreter()
ROWS, D_IN, D_SAE, K = (300, 64, 2000, 16) if DEVICE == "cuda" else (3, 8, 600, 4)


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((ROWS, D_IN), (D_SAE, D_IN), (D_SAE,), (ROWS, D_IN))
    return [torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def encode_and_decode(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, path: str) -> tuple:
    values, indices = kernel.topk_encode(x, W, b, K, 0, None, path)
    return values, indices, sk.sparse_decode(values, indices, W)


def weight_gradients() -> tuple:
    x, W, b, grad = tensors()
    leaves = [t.requires_grad_() for t in (W, b)]
    values, indices = sk.topk_encode(x, *leaves, K)
    return torch.autograd.grad(sk.sparse_decode(values, indices, leaves[0]), leaves, grad)


@pytest.mark.parametrize("path", ["fused", "slab", "sort"])
def test_no_launch_path_asks_the_device(monkeypatch, path):
    """Every way from a tensor to a Python number is closed; overflowing rows are found by kernels alone."""
    with monkeypatch.context() as watched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy"):
            watched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
        values = encode_and_decode(*tensors()[:3], path)[0]
        gradients = weight_gradients() if path == "fused" else ()
    x, W, b, _ = tensors()
    torch.testing.assert_close(values, torch.relu(x @ W.mT + b).topk(K).values, rtol=1e-4, atol=1e-4)
    assert all(bool(g.any()) for g in gradients)


if DEVICE == "cuda":

    def captured(run: Callable[[], tuple]) -> tuple[torch.cuda.CUDAGraph, tuple]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        return graph, out

    @pytest.mark.parametrize("path", ["fused", "slab", "sort"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_encode_and_decode(dtype, path):
        x, W, b, fresh = tensors(dtype)
        graph, out = captured(lambda: encode_and_decode(x, W, b, path))
        x.copy_(fresh)
        graph.replay()
        for got, want in zip(out, encode_and_decode(x, W, b, path), strict=True):
            assert torch.equal(got, want)

    @pytest.mark.parametrize("encode", [sk.topk_encode, sk.batch_topk_encode])
    def test_encoders_that_guess_by_cuda(monkeypatch, encode):
        """Every replay guesses anew, and takes again what its own guess was too high for."""
        if _native.cuda_error is not None:
            pytest.skip(_native.cuda_error)
        monkeypatch.setattr(cuda_kernel, "_FEWEST_ROUNDS", 0)
        x, fresh = (torch.randn(5000, D_IN, device=DEVICE).bfloat16() for _ in range(2))
        W, b = (t.bfloat16() for t in tensors()[1:3])
        with sk.backend("cuda"):
            graph, out = captured(lambda: encode(x, W, b, K))
            x.copy_(3 * fresh)
            graph.replay()
            want = encode(x, W, b, K)
        for one, other in zip(out, want, strict=True):
            assert torch.equal(one, other)

    def test_statistics():
        x, W, b, _ = tensors()
        values, indices = sk.topk_encode(x, W, b, K)
        settings = {"histogram": True, "top": 4, "cooccurrence": True, "device": DEVICE}
        stats, plain = (sk.ActivationStats(D_SAE, **settings) for _ in range(2))
        ids = torch.arange(ROWS, device=DEVICE)
        graph, _ = captured(lambda: stats.update(values, indices, ids))
        before = stats.counts.clone()
        graph.replay()
        plain.update(values, indices, ids)
        assert torch.equal(stats.counts - before, plain.counts) and torch.equal(stats.histogram, 3 * plain.histogram)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_whole_training_step(dtype):
        """Loss, gradients and optimiser of a graph are those of the same steps without one."""
        fresh = [torch.randn(ROWS, D_IN, device=DEVICE, dtype=dtype) for _ in range(6)]
        states = []
        for with_graph in (False, True):
            torch.manual_seed(0)
            sae = sk.TopKSAE(D_IN, D_SAE, K, device=DEVICE, dtype=dtype)
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, capturable=True)
            x = fresh[0].clone()

            def step(sae=sae, optimizer=optimizer, x=x):
                optimizer.zero_grad(set_to_none=False)
                sae.loss(x).loss.backward()
                optimizer.step()
                return ()

            run = step
            if with_graph:
                run = captured(step)[0].replay  # two steps before the capture, none in it
            else:
                step(), step()
            for batch in fresh:
                x.copy_(batch)
                run()
            states.append({name: p.clone() for name, p in sae.state_dict().items() if torch.is_tensor(p)})
        for name, want in states[0].items():
            torch.testing.assert_close(states[1][name], want, msg=lambda text, name=name: f"{name}: {text}")

    def test_no_waiting_in_a_step():
        sae = sk.TopKSAE(D_IN, D_SAE, K, device=DEVICE)
        x = tensors()[0]
        sae.loss(x).loss.backward()
        before = sae.W_enc.grad.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sae.loss(x).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(sae.W_enc.grad, 2 * before)  # the second step's gradient came on top
