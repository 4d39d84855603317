"""What is measured on a GPU, in the order of importance."""

from dataclasses import replace
from typing import NamedTuple

from sae_kernels.bench.cases import Case
from sae_kernels.bench.providers import COMPILED as CAN_COMPILE

EVERY = ("topk_encode", "sparse_decode", "module", "activation_stats")
SHORT = (*EVERY, "threshold_encode", "batch_topk_encode")
ORDER = (
    ("topk_encode", "forward"),
    ("sparse_decode", "forward"),
    ("module", "step"),
    ("activation_stats", "forward"),
    ("first_call", "forward"),
    ("threshold_encode", "forward"),
    ("topk_encode", "backward"),
    ("sparse_decode", "backward"),
    ("batch_topk_encode", "forward"),
    ("module", "forward"),
    ("serving", "forward"),
)
COMPILED = "torch_compile"  # takes most of a minute to build one call: everything else comes first
HEADLINE = (
    Case("sequential", 1048576, 64, 4096, 32, "bfloat16", SHORT, quick=True),
    Case("collaborative", 1048576, 256, 16384, 32, "bfloat16", SHORT, quick=True),
    Case("embeddings", 131072, 1536, 24576, 64, "bfloat16", (*EVERY, "threshold_encode"), quick=True),
    Case("language", 32768, 4096, 131072, 64, "bfloat16", EVERY, quick=True),
)
SMALL = (
    Case("cold", 64, 256, 16384, 32, "bfloat16", ("first_call",)),
    *(Case(f"serve-{rows}", rows, 256, 16384, 32, "bfloat16", ("serving",)) for rows in (1, 64, 1024)),
)
TINY = Case("tiny", 4, 8, 40, 3, "float32", (*EVERY, "serving"), quick=True)

TUNED = ("fused", "select", "slab", "decode", "sums", "dot")  # Triton's plans that are swept: to be compiled


class Cell(NamedTuple):
    """One comparison; compiled: of everybody once more, torch.compile among them."""

    op: str
    mode: str
    case: Case
    compiled: bool = False

    @property
    def key(self) -> tuple:
        """As in measure.Row.cell."""
        return (self.op, self.mode, *self.case.size)


def _others() -> list[Case]:
    three = EVERY[:3]
    return [
        Case("collaborative-fp32", 65536, 256, 8192, 32, "float32", three),
        Case("sequential-short", 8192, 64, 4096, 32, "bfloat16", three),
        Case("collaborative-narrow", 65536, 256, 2048, 8, "bfloat16", three),
        Case("embeddings-768", 131072, 768, 49152, 128, "bfloat16", three),
        Case("collaborative-512", 131072, 512, 8192, 64, "bfloat16", three),
        Case("embeddings-fp16", 131072, 1536, 24576, 64, "float16", three),
        Case("embeddings-fp32", 16384, 1536, 24576, 64, "float32", three),
    ]


def plan(device: str, ops: tuple[str, ...] = (), headline: bool = False) -> list[Cell]:
    """The cells for a GPU; for device "cpu" those of one tiny case, a rehearsal. ops, headline: these alone."""
    groups = [[TINY]] if device == "cpu" else [[*HEADLINE, *SMALL]] if headline else [[*HEADLINE, *SMALL], _others()]
    cells = [
        Cell(op, mode, case)
        for cases in groups
        for op, mode in ORDER
        for case in cases
        if op in case.ops and (not ops or op in ops)
    ]
    if device == "cpu" or headline:
        return cells
    return cells + [cell._replace(compiled=True) for cell in cells if cell.case in HEADLINE and cell[:2] in CAN_COMPILE]


def smaller(case: Case, rows: int) -> Case:
    """The case with at most so many rows: configurations depend on the weights alone."""
    return replace(case, rows=min(case.rows, rows))
