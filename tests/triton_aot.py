"""Compiles every configuration of the Triton kernels for sm_80, sm_90 and sm_100, with no GPU.

`python tests/triton_aot.py [kernel ...]` writes triton_aot.csv beside this file: registers per thread, bytes of stack
(spills stand there), bytes of shared memory, SASS instructions. test_triton_aot.py reads it and compiles a sample
again.
"""

import csv
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from sae_kernels.kernels import (  # noqa: E402  # noqa: E402
    activation_stats,
    latent_sums,
    sae_loss,
    sparse_decode,
    topk_encode_fused,
    topk_select,
    tuning,
)

ARCHS = (80, 90, 100)
TABLE = Path(__file__).with_suffix(".csv")
FIELDS = ("kernel", "configuration", "arch", "registers", "stack", "shared", "instructions")


TYPES = {"slab": "*fp32", "mask": "*u8", "keys": "*i64", "counts": "*i32", "overflows": "*i32", "indices": "*i32"}
TYPES |= {"marks": "*u8", "weight": "*fp32"}
TYPES |= {
    "threshold": "*fp32",
    "passed": "*i32",
    "codes": "*bf16",
    "groups": "*fp32",
    "names": "*i32",
    "fills": "*i32",
    "prefixes": "*i32",
    "budget_of": "*i32",
}
TYPES |= dict.fromkeys(("starts", "chunks", "first_slot", "latent_of", "slot_of", "split_latents"), "*i64")
TYPES |= dict.fromkeys(("order", "begins", "ends"), "*i32")
LENGTHS = tuple(1 << n for n in range(5, 13))  # of rows, one per bucket of tuning.py
ROW_LENGTHS = ("d_in", "d_out", "d")
WIDE = {"fp64": "fp64"}
# the statistics count in 64 bits what the selection counts in 32
OF_STATS = dict.fromkeys(
    ("order", "counts", "sums", "last", "rejected", "foreign", "numbers", "table", "position"), "*i64"
)
OF_STATS |= {"maximum": "*fp64", "top_values": "*fp64", "top_ids": "*i64", "ids": "*i64", "keys": "*i32"}
WIDE_DATA = ("parts", "slots", "slots_x", "slot_totals", "scale", "errors", "grad_errors")
DATA = ("x", "W", "bias", "values", "out", "grad", "rows_of", "weights", "sums", "totals", "dots")
DATA += ("residual", "more", "grad_values", "sums_x")
CAPPED = (topk_encode_fused.rescan_product, sae_loss.grad_chunks, latent_sums.sum_chunks, sparse_decode.dot_rows)


def types(dtype: str) -> dict[str, str]:
    """Type of every argument by its name; what is not named here is a size."""
    wide = "*" + WIDE.get(dtype, "fp32")
    return {**TYPES, **dict.fromkeys(DATA, "*" + dtype), **dict.fromkeys(WIDE_DATA, wide)}


def kernels():
    """kernel, dtype, constants, warps, stages of every configuration that the launchers choose from, each once: on a
    GPU of which nothing is known, and on each one in tuning.json.
    """
    seen = set()
    for gpu in (None, *tuning.table()):
        tuning.gpu = lambda gpu=gpu: gpu
        for case in configurations():
            name = case[0].__name__, configuration(*case)
            if name not in seen:
                seen.add(name)
                yield case


def configurations():
    for P in tuning.SELECT:
        plan = tuning.select_plan(P // 3)
        for activation in (topk_select.ABS, topk_select.RELU) if P == 128 else (topk_select.ABS,):
            select = {"ACTIVATION": activation, "HAS_BIAS": True, "HAS_MASK": True, "P": P}
            aligned = {**select, "ALIGNED": True, "ROWS": plan.ROWS}
            yield topk_select.filter_slab, "bf16", aligned, plan.warps, 3
            yield topk_select.rescan_slab, "bf16", select, plan.rescan_warps, 3
            final = {"FINAL": True, "ACTIVATION": activation, "ROWS": plan.ROWS, "P": P}
            yield topk_select.rank, "bf16", final, plan.warps, 3
            yield topk_select.rank, "bf16", {**final, "FINAL": False, "values": None, "indices": None}, plan.warps, 3
    yield from fused_kernels()
    yield from stats_kernels()
    select = {"ACTIVATION": topk_select.ABS, "HAS_BIAS": True, "HAS_MASK": True, "P": 1024}
    yield topk_select.write_keys, "bf16", select, 4, 3
    yield topk_select.write_codes, "bf16", {"ACTIVATION": topk_select.ABS, "P": 1024}, 4, 3
    yield sparse_decode.put_codes, "bf16", {"ROWS": 32}, 1, 3
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp64", 8)):
        acc = {"ACC": tl.float64 if dtype == "fp64" else tl.float32}
        for width in LENGTHS:
            decode = tuning.decode_plan(width, size)
            tile = {"ROWS": decode.ROWS, "BLOCK_D": decode.BLOCK_D, "UNROLL": decode.UNROLL}
            yield sparse_decode.decode, dtype, {**acc, **tile, "HAS_BIAS": True}, decode.warps, 3
            for k in (4, 64):
                plan = tuning.dot_plan(k, width, size)
                yield (
                    sparse_decode.dot_rows,
                    dtype,
                    {**acc, "BLOCK_K": plan.BLOCK_K, "BLOCK_D": plan.BLOCK_D},
                    plan.warps,
                    3,
                )
            plan = tuning.sums_plan(width, size)
            join = {**acc, "BLOCK_D": plan.BLOCK_D, "HAS_TOTALS": True}
            for dots in (True, False):
                sums = {**join, "K": 64, "HAS_DOTS": dots, "ENTRIES": plan.ENTRIES}
                yield latent_sums.sum_chunks, dtype, sums, plan.warps, 3
            yield latent_sums.join_chunks, dtype, join, plan.warps, 3
            yield sae_loss.decode_errors, dtype, {**acc, **tile, "HAS_BIAS": True}, decode.warps, 3
            yield sae_loss.prefix_gradients, dtype, {**acc, **tile}, decode.warps, 3
            grads = {**acc, "K": 64, "HAS_BUDGETS": True, "HAS_SCALE": True, "HAS_MORE": True, "RELU": True}
            add = {**acc, "HAS_WEIGHTS": True, "SHARE": 512, "ROWS": plan.ENTRIES, "BLOCK_D": plan.BLOCK_D}
            yield sae_loss.add_rows, dtype, add, plan.warps, 3
            for dots, x in ((True, True), (True, False), (False, False)):
                options = {**grads, "BLOCK_D": plan.BLOCK_D, "HAS_DOTS": dots, "HAS_X": x, "ENTRIES": plan.ENTRIES}
                yield sae_loss.grad_chunks, dtype, options, plan.warps, 3


def fused_kernels():
    dtypes = (("bf16", 2, ("ieee",)), ("fp16", 2, ("ieee",)), ("fp32", 4, ("ieee", "tf32")))
    for P, d_in in itertools.product(tuning.SELECT, LENGTHS):
        plan = tuning.select_plan(P // 3)
        for dtype, size, precisions in dtypes:
            tile = tuning.fused_tile(d_in, size)
            common = {"ACTIVATION": topk_select.ABS, "GROWTH": tile.GROWTH, "P": P}
            block = {"BLOCK_N": tile.BLOCK_N, "LEVELS": tile.LEVELS}
            rest = {"HAS_BIAS": True, "BLOCK_M": tile.BLOCK_M, "BLOCK_D": tile.BLOCK_D, "TILES": tile.TILES}
            if P == 128:  # P is but a stride there
                for precision, limited in itertools.product(precisions, (True, False)):
                    if limited and (dtype, precision) == ("fp32", "ieee"):
                        continue  # goes by slabs
                    constants = {**common, **block, **rest, "PRECISION": precision, "HAS_THRESHOLD": limited}
                    yield topk_encode_fused.filter_product, dtype, constants, tile.warps, tile.stages
            if dtype == "fp32":
                yield topk_encode_fused.take_groups, dtype, {**common, **block, "AT_ONCE": tile.AT_ONCE}, 1, 3
            if P in (64, 128) or dtype == "bf16":
                narrow = {**common, "HAS_BIAS": True, "HAS_THRESHOLD": True, "BLOCK_D": tuning.RESCAN_D}
                yield topk_encode_fused.rescan_product, dtype, narrow, plan.rescan_warps, 3


def stats_kernels():
    block = {"BLOCK": activation_stats.BLOCK}
    for dtype in ("fp32", "bf16", "fp64"):
        yield activation_stats.add_entries, dtype, {**block, "HAS_NUMBERS": True}, 4, 3
    marks = {"K": 64, "HAS_WEIGHT": True, "BLOCK": 2 * activation_stats.BLOCK}
    yield activation_stats.mark_fired, "bf16", marks, 4, 3
    yield activation_stats.carry_limbs, "fp32", block, 4, 3
    yield activation_stats.count_bins, "bf16", block, 4, 3
    yield activation_stats.count_pairs, "bf16", {"HAS_POSITION": True, "A": 16, "B": 32}, 4, 3
    yield activation_stats.mark_candidates, "bf16", block, 4, 3
    for size in (1, 16, activation_stats.LARGEST_TOP):
        yield activation_stats.merge_candidates, "bf16", {"NP": size, "CHUNK": activation_stats.CHUNK}, 4, 3


def configuration(kernel, dtype: str, constants: dict, warps: int, stages: int) -> str:
    shown = ((n, getattr(v, "name", v)) for n, v in constants.items())
    return " ".join([dtype, *(f"{n}={v}" for n, v in shown), f"warps={warps}", f"stages={stages}"])


def compiled(kernel, dtype: str, constants: dict, warps: int, stages: int, arch: int) -> dict[str, int]:
    """Compiles one configuration; pointers and the row length are multiples of 16, as they mostly are."""
    known = types(dtype) | (OF_STATS if kernel.__module__.endswith("activation_stats") else {})
    signature = {n: "constexpr" if n in constants else known.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n][0] == "*" or n in ROW_LENGTHS
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    if kernel is activation_stats.add_entries:
        options["enable_fp_fusion"] = False
    if kernel in CAPPED:
        options["maxnreg"] = tuning.MOST_REGISTERS
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "--dump-sass", file.name)
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared = built.metadata.shared
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
    stack = found["stack"] + found["local"]
    return {"registers": found["reg"], "stack": stack, "shared": shared, "instructions": instructions}


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def main(only: list[str]) -> None:
    """Writes the table; kernels not named in `only` keep their rows where some are named."""
    kept = [r for r in read() if r["kernel"] not in only] if only else []
    with TABLE.open("w", newline="") as file:
        rows = csv.DictWriter(file, FIELDS, lineterminator="\n")
        rows.writeheader()
        rows.writerows(kept)
        for case in kernels():
            if only and case[0].__name__ not in only:
                continue
            for arch in ARCHS:
                row = {
                    "kernel": case[0].__name__,
                    "configuration": configuration(*case),
                    "arch": arch,
                    **compiled(*case, arch),
                }
                rows.writerow(row)
                file.flush()
                print(*row.values(), flush=True)


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main(sys.argv[1:])
