"""The backend "cuda" behind the public ops: its kernels run on CPU tensors here, by tests/cuda_host."""

import cuda_library
import pytest
import torch
from test_sparse_decode import case, gradients
from test_topk_encode import assert_is_topk

import sae_kernels as sk
from sae_kernels import _native
from sae_kernels.ops import _backend, reference


@pytest.fixture
def on_cuda(monkeypatch):
    cuda_library.load_for_cpu()
    cuda_library.pretend(monkeypatch)
    with sk.backend("cuda"):
        yield


def encode_gradients(x, W, b, k, **options):
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    values, indices = sk.topk_encode(*leaves, k, **options)
    (values * torch.arange(1, k + 1)).sum().backward()
    return values.detach(), indices, *(t.grad for t in leaves)


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
def test_topk_encode_and_its_gradients(on_cuda, activation):
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=g) for s in ((2, 3, 12), (90, 12), (90,)))
    mask = torch.arange(90) % 3 > 0
    options = {"activation": activation, "latent_mask": mask}
    got = encode_gradients(x, W, b, 7, **options)
    with sk.backend("reference"):
        want = encode_gradients(x, W, b, 7, **options)
    assert torch.equal(got[1], want[1]) and got[1].shape == (2, 3, 7)
    for a, e in zip(got[:1] + got[2:], want[:1] + want[2:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_sparse_decode_and_its_gradients(on_cuda):
    values, indices, W, b = case(7, 3, 50, 36, torch.float32)
    grad = torch.randn(7, 36, generator=torch.Generator().manual_seed(9))
    got = gradients(values, indices, W, b, grad)
    with sk.backend("reference"):
        want = gradients(values, indices, W, b, grad)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    leaf = values.clone().requires_grad_()
    sk.sparse_decode(leaf, indices, W, b).backward(grad)
    torch.testing.assert_close(leaf.grad, want[1], rtol=1e-5, atol=1e-5)


def test_float64_takes_the_reference_and_compiled_graphs_the_kernels(on_cuda):
    x, W = torch.randn(4, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    got, want = sk.topk_encode(x, W, None, 3), reference.topk_encode(x, W, None, 3)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    x, W = x.float(), W.float()
    run = torch.compile(
        lambda x, W: sk.sparse_decode(*sk.topk_encode(x, W, None, 3), W), fullgraph=True, backend="eager"
    )
    assert torch.equal(run(x, W), sk.sparse_decode(*sk.topk_encode(x, W, None, 3), W))
    assert_is_topk(*sk.topk_encode(x, W, None, 3), x, W, None, 3)


def test_no_launch_path_asks_the_device(on_cuda, monkeypatch):
    """Every way from a tensor to a Python number is closed, so steps can be captured in CUDA graphs."""
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=g) for s in ((3, 8), (60, 8), (60,)))
    names = ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    leaves = [t.requires_grad_() for t in (W, b)]
    values, indices = sk.topk_encode(x, *leaves, 4)
    dW, db = torch.autograd.grad(sk.sparse_decode(values, indices, leaves[0]), leaves, torch.ones(3, 8))
    assert dW.shape == W.shape and db.shape == b.shape


def test_forced_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_native, "cuda_error", "not built: no nvcc")
    with (
        pytest.raises(ValueError, match="'cuda' cannot run: the CUDA library is not built: no nvcc"),
        sk.backend("cuda"),
    ):
        pass
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' cannot run: there is no CUDA device"), sk.backend("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with sk.backend("cuda"), pytest.raises(ValueError, match="'cuda' is forced and the tensors are on cpu"):
        sk.topk_encode(torch.ones(2, 3), torch.ones(3, 3), None, 1)


def test_the_backend_of_a_cuda_device(monkeypatch):
    """Triton, else CUDA C++, else the reference with both causes; a GPU that is too old has no CUDA C++."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backend, "triton_error", lambda: None)
    assert _backend.pick(device) == "triton"
    monkeypatch.setattr(_backend, "triton_error", lambda: "no Triton here")
    assert _backend.pick(device) == "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(_backend, "_warned", False)
    with pytest.warns(UserWarning, match="no Triton here; the CUDA kernels need compute capability 8.0 .*has 7.5"):
        assert _backend.pick(device) == "reference"


def test_triton_that_cannot_build_hands_over(monkeypatch):
    """With one warning; to CUDA C++ where that is there, else to the reference."""

    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    def broken(tensor):
        raise CompilationError("no such instruction")

    monkeypatch.setattr(_backend, "_broken", None)
    cuda_library.pretend(monkeypatch)
    run = _backend.triton_or(broken, _backend.cuda_or(lambda tensor: "cuda", lambda tensor: "plain"))
    with pytest.warns(UserWarning, match="runs its CUDA C\\+\\+ kernels: Triton cannot build broken: CompilationError"):
        assert run(torch.ones(1)) == "cuda"
    monkeypatch.setattr(_native, "cuda_error", "not built")
    assert run(torch.ones(1)) == "plain"
    monkeypatch.setattr(_backend, "_broken", None)
    with pytest.warns(UserWarning, match="runs its plain torch reference, which is slow: Triton cannot build"):
        assert run(torch.ones(1)) == "plain"
