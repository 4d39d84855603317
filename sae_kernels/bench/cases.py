"""The registry of cases: the sizes that recommenders, embedding models and language models have."""

from dataclasses import dataclass, replace

FLOAT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# op -> its modes
OPS = {
    "topk_encode": ("forward", "backward"),
    "sparse_decode": ("forward", "backward"),
    "module": ("forward", "step"),
    "activation_stats": ("forward",),
    "threshold_encode": ("forward",),
    "batch_topk_encode": ("forward",),
    "refit_values": ("forward",),
    "serving": ("forward",),
    "first_call": ("forward",),
    "import_time": ("import",),
}
ALIASES = {"encode": "topk_encode", "decode": "sparse_decode", "statistics": "activation_stats"}
REFIT_STEPS = 4
INPUTS = ("random", "sorted", "equal", "negative", "clustered")


@dataclass(frozen=True)
class Case:
    """One problem size. inputs: "random", or one of the shapes of data that hurt top-k selections (see INPUTS)."""

    name: str
    rows: int
    d_in: int
    d_sae: int
    k: int
    dtype: str = "float32"
    ops: tuple[str, ...] = ("topk_encode", "sparse_decode", "module")
    quick: bool = False
    inputs: str = "random"

    @property
    def size(self) -> tuple[int, int, int, int, str]:
        return self.rows, self.d_in, self.d_sae, self.k, self.dtype

    def with_rows(self, rows: int) -> "Case":
        return replace(self, rows=rows)


def _cases() -> dict[str, Case]:
    serving, cold = ("serving",), ("first_call", "import_time")
    thresholds = ("threshold_encode", "batch_topk_encode")
    cases = [
        # sequential recommenders: d_in 64 to 256
        Case("sequential", 8192, 64, 4096, 32, quick=True),
        Case("sequential-narrow", 65536, 64, 1024, 8),
        Case("sequential-128", 16384, 128, 4096, 32),
        Case("sequential-1m", 1048576, 64, 1024, 8),
        # collaborative recommenders: d_in 256 to 1024
        Case("collaborative", 4096, 256, 8192, 32, quick=True),
        Case("collaborative-64k", 65536, 256, 2048, 8),
        Case("collaborative-512", 8192, 512, 8192, 64),
        Case("collaborative-1024", 4096, 1024, 16384, 64),
        Case("collaborative-1m", 1048576, 256, 4096, 32),
        # embedding models: d_in 384 to 1536
        Case("embeddings", 2048, 1536, 9216, 64, quick=True),
        Case("embeddings-384", 8192, 384, 6144, 16),
        Case("embeddings-768", 2048, 768, 49152, 128),
        # language models: d_in 2048 to 4096
        Case("language", 512, 2048, 32768, 32),
        Case("language-4096", 128, 4096, 32768, 192),
        # narrow floats
        Case("sequential-bf16", 8192, 64, 4096, 32, "bfloat16"),
        Case("collaborative-bf16", 4096, 256, 8192, 32, "bfloat16"),
        Case("embeddings-bf16", 2048, 1536, 9216, 64, "bfloat16"),
        # one request, a few, a small batch
        *(Case(f"serve-{rows}", rows, 256, 16384, 32, ops=serving, quick=True) for rows in (1, 8, 64)),
        *(Case(f"serve-sequential-{rows}", rows, 64, 4096, 32, ops=serving) for rows in (1, 8, 64)),
        *(Case(f"serve-embeddings-{rows}", rows, 1536, 9216, 64, ops=serving) for rows in (1, 8, 64)),
        # as many latents as pass: k of a row on average
        Case("threshold-sequential", 8192, 64, 4096, 32, ops=thresholds),
        Case("threshold-collaborative", 4096, 256, 8192, 32, ops=thresholds),
        Case("threshold-embeddings", 2048, 1536, 9216, 64, ops=thresholds),
        # values fitted to the input
        Case("refit-sequential", 8192, 64, 4096, 32, ops=("refit_values",)),
        Case("refit-collaborative", 4096, 256, 8192, 32, ops=("refit_values",)),
        Case("refit-embeddings", 2048, 1536, 9216, 64, ops=("refit_values",)),
        # a stream of sparse codes
        Case("stream", 1048576, 0, 16384, 32, ops=("activation_stats",), quick=True),
        Case("stream-wide", 262144, 0, 131072, 64, ops=("activation_stats",)),
        Case("cold", 64, 256, 16384, 32, ops=cold, quick=True),
    ]
    return {case.name: case for case in cases}


CASES = _cases()


def flops(op: str, mode: str, case: Case) -> float:
    """Arithmetic the result needs, the same for every provider; a multiply and an add are two."""
    dense, sparse = 2.0 * case.rows * case.d_in * case.d_sae, 2.0 * case.rows * case.d_in * case.k
    return {
        ("topk_encode", "forward"): dense,
        ("topk_encode", "backward"): sparse,
        ("sparse_decode", "forward"): sparse,
        ("sparse_decode", "backward"): 2 * sparse,
        ("module", "forward"): dense + sparse,
        ("module", "step"): dense + 4 * sparse,
        ("activation_stats", "forward"): 4.0 * case.rows * case.k,
        ("threshold_encode", "forward"): dense,
        ("batch_topk_encode", "forward"): dense,
        ("refit_values", "forward"): (2 * REFIT_STEPS + 1) * sparse,
        ("serving", "forward"): dense,
        ("first_call", "forward"): dense,
    }.get((op, mode), 0.0)


def result_bytes(op: str, mode: str, case: Case) -> int:
    """Size of what the contract returns: int32 indices, gradients in the weights' dtype."""
    size = FLOAT_BYTES[case.dtype]
    code, weight, row = case.rows * case.k, case.d_sae * case.d_in, case.rows * case.d_in
    return {
        ("topk_encode", "forward"): code * (size + 4),
        ("topk_encode", "backward"): (weight + case.d_sae) * size,
        ("sparse_decode", "forward"): row * size,
        ("sparse_decode", "backward"): (code + weight + case.d_in) * size,
        ("module", "forward"): row * size,
        ("module", "step"): (2 * weight + case.d_sae + case.d_in) * size,
        ("threshold_encode", "forward"): code * (size + 4),
        ("batch_topk_encode", "forward"): code * (size + 4),
        ("refit_values", "forward"): code * size,
        ("serving", "forward"): code * (size + 4),
        ("first_call", "forward"): code * (size + 4),
    }.get((op, mode), 0)


def gathered_bytes(op: str, mode: str, case: Case) -> int:
    """What has to come from a cache that holds the weights, where a row's weights are picked one by one."""
    picked = case.rows * case.k * case.d_in * FLOAT_BYTES[case.dtype]
    return {("sparse_decode", "forward"): picked, ("sparse_decode", "backward"): picked}.get((op, mode), 0)


def least_bytes(op: str, mode: str, case: Case) -> int:
    """What has to cross the memory bus once: every input read, every result written."""
    size = FLOAT_BYTES[case.dtype]
    code, weight, row = case.rows * case.k * (size + 4), case.d_sae * case.d_in * size, case.rows * case.d_in * size
    reads = {
        ("topk_encode", "forward"): row + weight,
        ("topk_encode", "backward"): row + code,
        ("sparse_decode", "forward"): code + weight,
        ("sparse_decode", "backward"): code + weight + row,
        ("module", "forward"): row + 2 * weight,
        ("module", "step"): row + 2 * weight,
        ("activation_stats", "forward"): code,
        ("threshold_encode", "forward"): row + weight,
        ("batch_topk_encode", "forward"): row + weight,
        ("refit_values", "forward"): row + weight + code,
        ("serving", "forward"): row + weight,
        ("first_call", "forward"): row + weight,
    }.get((op, mode), 0)
    return reads + result_bytes(op, mode, case)
