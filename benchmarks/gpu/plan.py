"""What is measured on a GPU, in the order of importance."""

from dataclasses import replace
from typing import NamedTuple

from sae_kernels.bench.cases import Case

EVERY = ("topk_encode", "sparse_decode", "module", "activation_stats")
ORDER = (
    ("topk_encode", "forward"),
    ("sparse_decode", "forward"),
    ("module", "step"),
    ("activation_stats", "forward"),
    ("topk_encode", "backward"),
    ("sparse_decode", "backward"),
    ("module", "forward"),
    ("serving", "forward"),
    ("first_call", "forward"),
)
HEADLINE = (
    Case("sequential", 1048576, 64, 4096, 32, "bfloat16", EVERY, quick=True),
    Case("collaborative", 1048576, 256, 16384, 32, "bfloat16", EVERY, quick=True),
    Case("embeddings", 131072, 1536, 24576, 64, "bfloat16", EVERY, quick=True),
    Case("language", 32768, 4096, 131072, 64, "bfloat16", EVERY, quick=True),
)
TINY = Case("tiny", 4, 8, 40, 3, "float32", (*EVERY, "serving"), quick=True)


class Cell(NamedTuple):
    op: str
    mode: str
    case: Case

    @property
    def key(self) -> tuple:
        """As in measure.Row.cell."""
        return (self.op, self.mode, *self.case.size)


def _others() -> list[Case]:
    three = EVERY[:3]
    return [
        *(Case(f"serve-{rows}", rows, 256, 16384, 32, "bfloat16", ("serving",)) for rows in (1, 64, 1024)),
        Case("cold", 64, 256, 16384, 32, "bfloat16", ("first_call",)),
        Case("collaborative-fp32", 65536, 256, 8192, 32, "float32", three),
        Case("sequential-short", 8192, 64, 4096, 32, "bfloat16", three),
        Case("collaborative-narrow", 65536, 256, 2048, 8, "bfloat16", three),
        Case("embeddings-768", 131072, 768, 49152, 128, "bfloat16", three),
        Case("collaborative-512", 131072, 512, 8192, 64, "bfloat16", three),
        Case("embeddings-fp16", 131072, 1536, 24576, 64, "float16", three),
        Case("embeddings-fp32", 16384, 1536, 24576, 64, "float32", three),
    ]


def plan(device: str, ops: tuple[str, ...] = ()) -> list[Cell]:
    """The cells for a GPU; for device "cpu" those of one tiny case, a rehearsal. ops: these alone."""
    groups = [[TINY]] if device == "cpu" else [list(HEADLINE), _others()]
    return [
        Cell(op, mode, case)
        for cases in groups
        for op, mode in ORDER
        for case in cases
        if op in case.ops and (not ops or op in ops)
    ]


def first_of_each_op(cells: list[Cell]) -> list[Cell]:
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        found.setdefault((cell.op, cell.mode), cell)
    return list(found.values())


def smaller(case: Case, rows: int) -> Case:
    """The case with at most so many rows: configurations depend on the weights alone."""
    return replace(case, rows=min(case.rows, rows))
