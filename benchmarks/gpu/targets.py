"""The targets set for the H200, met or not, from whatever rows there are."""

from sae_kernels.bench import table
from sae_kernels.bench.measure import Row

from .plan import HEADLINE

# case -> encode over F.linear alone at most; linear + relu + topk over encode at least
ENCODE = {"sequential": (1.0, 20), "collaborative": (1.3, 10), "embeddings": (1.15, 3), "language": (1.10, 1.8)}
EXTRA_MIB = 256
DECODE_PERCENT, STEP_OVER_PEER, STEP_OVER_TORCH, STATS_SHARE = 60, 3, 5, 0.05


def lines(rows: list[Row]) -> list[str]:
    """One line per target that can be judged."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.p50_ms:
            found.setdefault(row.cell, {}).setdefault(row.provider, row)  # ours forced stands after ours
    texts = []
    for case in HEADLINE:
        cell = {op: found.get((op, mode, *case.size), {}) for op, mode in _MODES}
        texts += [f"{case.rows} x {case.d_in} x {case.d_sae}, k {case.k}: {text}" for text in _judged(case.name, cell)]
    return texts


_MODES = (
    ("topk_encode", "forward"), ("sparse_decode", "forward"), ("module", "step"), ("activation_stats", "forward"),
)  # fmt: skip


def _judged(name: str, cell: dict[str, dict[str, Row]]) -> list[str]:
    encode, decode, step, stats = (cell[op] for op, _ in _MODES)
    most, least = ENCODE[name]
    found = [
        _ratio("encode over F.linear alone", encode, "sae_kernels", "linear", most, above=False),
        _ratio("linear + relu + topk over encode", encode, "torch", "sae_kernels", least),
        _ratio("embedding_bag over decode", decode, "embedding_bag", "sae_kernels", 1),
        _ratio("eai-sparsify's step over ours", step, "eai_sparsify", "sae_kernels", STEP_OVER_PEER),
        _ratio("plain torch's step over ours", step, "torch", "sae_kernels", STEP_OVER_TORCH),
        _ratio("statistics over encode", {"s": stats.get("sae_kernels"), "e": encode.get("sae_kernels")}, "s", "e",
               STATS_SHARE, above=False),
    ]  # fmt: skip
    mine = encode.get("sae_kernels")
    if mine is not None and mine.extra_bytes is not None:
        found.append(_text("encode's extra MiB", mine.extra_bytes / 2**20, EXTRA_MIB, above=False))
    mine = decode.get("sae_kernels")
    if mine is not None and mine.pct_of_ceiling is not None:
        found.append(_text("decode's % of its bound by memory or L2", mine.pct_of_ceiling, DECODE_PERCENT))
    return [text for text in found if text]


def _ratio(what: str, rows: dict, over: str, under: str, limit: float, above: bool = True) -> str | None:
    first, second = rows.get(over), rows.get(under)
    return None if first is None or second is None else _text(what, first.p50_ms / second.p50_ms, limit, above)


def _text(what: str, value: float, limit: float, above: bool = True) -> str:
    met = value >= limit if above else value <= limit
    return f"{what} {value:.3g}, wanted at {'least' if above else 'most'} {limit:g}: {'met' if met else 'MISSED'}"


def report(rows: list[Row]) -> str:
    """The whole table of what there is, then the targets."""
    judged = lines(rows)
    return "\n".join([table.summary(rows), "", "targets:", *(f"  {text}" for text in judged or ["none measured yet"])])
