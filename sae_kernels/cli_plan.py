"""sae-kernels plan: what a large training run takes, before it is paid for."""

import argparse
import json

EXAMPLES = """examples:
  sae-kernels plan --rows 1e9 --d-in 1024 --d-sae 65536 --k 64            on 1, 8 and 64 H200, estimated
  sae-kernels plan --rows 1e9 --d-in 1024 --d-sae 65536 --gpus 1 16 --storage-gbs 40
  sae-kernels plan --rows 1e7 --d-in 256 --d-sae 4096 --gpus 1 --measure  on machines such as this one
  sae-kernels plan --rows 1e7 --d-in 256 --d-sae 4096 --gpus 1 --measure --check

--measure takes the costs of a step from runs of ten sizes on this machine, and --check compares what they predict for
three others with what those take. Without it the costs are an estimate from a datasheet, which the table names.
"""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _count(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


_count.__name__ = "count"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=_count, required=True, help="activations in the store, such as 1e9")
    parser.add_argument("--d-in", type=_count, required=True, help="numbers in a row")
    parser.add_argument("--d-sae", type=_count, required=True, help="latents")
    parser.add_argument("--k", type=_count, default=32, help="active latents per row (32)")
    parser.add_argument("--batch-size", type=_count, default=65536, help="rows per step, of all processes (65536)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the stored rows (bfloat16)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="processes (1 8 64)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="processes of a node (8)")
    parser.add_argument("--storage-gbs", type=float, default=10, metavar="GB/S", help="reading, per node (10)")
    parser.add_argument("--within-gbs", type=float, default=450, metavar="GB/S", help="between GPUs of a node (450)")
    parser.add_argument("--between-gbs", type=float, default=50, metavar="GB/S", help="between nodes, per GPU (50)")
    parser.add_argument("--measure", action="store_true", help="take the costs of a step from this machine")
    parser.add_argument("--device", default="cpu", help="where --measure runs (cpu)")
    parser.add_argument("--check", action="store_true", help="with --measure: predicted against measured steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from .plan import H200, Job, Rates, check, measure, plan, saturation

    if options.check and not options.measure:
        raise ValueError("--check compares with what --measure finds: give both")
    sizes = (options.rows, options.d_in, options.d_sae, options.k, options.batch_size)
    job = Job(*sizes, options.epochs, DTYPES[options.dtype])
    speeds = (options.storage_gbs * 1e9, options.within_gbs * 1e9, options.between_gbs * 1e9)
    rates = Rates(*speeds, options.per_node)
    costs = measure(device=options.device) if options.measure else H200
    found = {
        "costs": costs.source,
        "saturates_at": saturation(job, costs, rates),
        "plans": [plan(job, n, costs, rates) for n in options.gpus],
        "checks": [
            {"size": size, "predicted_seconds": guess, "measured_seconds": taken}
            for size, guess, taken in (check(costs, device=options.device) if options.check else [])
        ],
    }
    print(json.dumps(found) if options.json else _text(options, found))
    return 0


def _text(options: argparse.Namespace, found: dict) -> str:
    from .plan import MOST

    store = found["plans"][0]["store_bytes"]
    lines = [
        f"{options.rows:,} rows of {options.d_in} {options.dtype}: a store of {store / 1e9:,.1f} GB",
        f"costs: {found['costs']}",
        f"assumed: a node of {options.per_node} reads {options.storage_gbs:g} GB/s; {options.within_gbs:g} GB/s between"
        f" its GPUs, {options.between_gbs:g} GB/s from each to other nodes",
        "",
        f"{'GPUs':>6} {'latents over':>12} {'hours':>10} {'GPU hours':>10} {'GB each':>8}  a step, what it goes to",
    ]
    for way in found["plans"]:
        spent = sorted(way["seconds"].items(), key=lambda part: -part[1])
        parts = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in spent if seconds > 0)
        hours = way["hours"]
        lines.append(
            f"{way['processes']:>6} {way['shards']:>12} {hours:>10,.3g} {hours * way['processes']:>10,.3g} "
            f"{way['process_bytes'] / 1e9:>8,.1f}  {way['step_seconds'] * 1e3:,.3g} ms, by {way['driver']}: {parts}"
        )
    lines.append("")
    if found["saturates_at"] is None:
        lines.append(f"Up to {min(MOST, options.batch_size)}, twice as many are always at least 1.25 times as fast.")
    else:
        lines.append(f"From {found['saturates_at']} on, twice as many are less than 1.25 times as fast.")
    for row in found["checks"]:
        guess, taken = row["predicted_seconds"], row["measured_seconds"]
        size = "{} rows, d_in {}, d_sae {}, k {}".format(*row["size"])
        lines.append(
            f"{size}: predicted {guess * 1e3:.2f} ms, measured {taken * 1e3:.2f} ms ({guess / taken - 1:+.1%})"
        )
    return "\n".join(lines)
