"""The command line: demo, extract, train, eval, plan, bench, info."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, cli_extract, cli_plan, cli_train

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """examples:
  sae-kernels demo                                        simulated data, no network: a minute or two
  sae-kernels demo --data data/goodbooks10k --d 256       a real data set
  sae-kernels demo --interactions log.parquet --user-col user --item-col item --model sasrec --time-col ts
  sae-kernels extract --sasrec sasrec.npz --data data/ml1m --out runs/acts
  sae-kernels train activations.npy --out runs/sae --width 8 --k 32 --steps 5000
  sae-kernels eval runs/sae held_out.npy                  FVU, cosine, L0, dead share
  sae-kernels plan --rows 1e9 --d-in 1024 --d-sae 65536   what that takes on 1, 8 and 64 GPUs
  sae-kernels bench                                       these kernels against plain torch, in two minutes
  sae-kernels info                                        what runs here, and why not
"""
EVAL_EXAMPLES = """examples:
  sae-kernels eval runs/sae held_out.npy
  sae-kernels eval runs/sae held_out.npz --key hidden --json figures.json
  sae-kernels eval runs/sae runs/acts --device cuda        a store written by extract
"""
DEMO_EXAMPLES = """examples:
  sae-kernels demo                                         simulated catalogue with planted concepts
  sae-kernels demo --model sasrec                          the same as sequences
  sae-kernels demo --data data/goodbooks10k --d 256        layouts: goodbooks10k, ml1m, ml_latest_small
  sae-kernels demo --interactions ratings.csv --user-col userId --item-col movieId --rating-col rating --min-rating 4

Open <out>/report.html afterwards.
"""
BENCH_EXAMPLES = """examples:
  sae-kernels bench                                        the quick table: under two minutes on two cores
  sae-kernels bench --op encode --case collaborative       one comparison
  sae-kernels bench --full                                 every case and provider; writes benchmarks/results
  sae-kernels bench --scaling                              time and memory as rows, d_sae, k, d_in and threads grow
  sae-kernels bench --op encode --base HEAD~1              this code beside another commit's
  sae-kernels bench --list                                 cases, ops and providers by name
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a mistake in what was given, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    if options.command is None:
        _parser().print_help()
        return 0
    if options.traceback:
        return options.run(options)
    warnings.formatwarning = lambda message, *_: f"sae-kernels: {message}\n"
    try:
        _check_device(getattr(options, "device", None))
        return options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"sae-kernels {options.command}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nsae-kernels {options.command}: {_after_interrupt(options, error)}", file=sys.stderr)
        return 130


def _check_device(name: str | None) -> None:
    import torch

    try:
        kind = "cpu" if name is None else torch.device(name).type
    except RuntimeError:
        raise ValueError(f"device {name!r} is not here; choose from cpu, cuda or cuda:1 and so on") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not here: torch {torch.__version__} finds no CUDA device")


def _after_interrupt(options: argparse.Namespace, error: KeyboardInterrupt) -> str:
    folder = getattr(error, "checkpoint", None)
    if options.command == "extract":
        return f"interrupted; run the same command again to go on with {options.out}"
    if options.command == "demo":
        from .experiments.demo import DemoConfig

        out = DemoConfig(model=options.model, out=options.out).filled().out
        if (out / "run.json").is_file():
            return f"interrupted; run the same command with --resume to go on from {out}"
    if folder is None:
        return "interrupted; nothing to resume was written"
    return f"interrupted after step {error.step}; run the same command with --resume to go on from {folder}"


def _parser() -> _Parser:
    parser = _Parser(
        prog="sae-kernels",
        description="Sparse autoencoders on fast, exact kernels: for recommenders, embeddings and any PyTorch model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sae-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    _add_demo(commands)
    extract = "a model's activations into a store that a crash cannot spoil"
    cli_extract.add_arguments(_add(commands, "extract", cli_extract.run, extract, cli_extract.EXAMPLES))
    train = "train TopK SAEs on a file or a store of activations"
    cli_train.add_arguments(_add(commands, "train", cli_train.run, train, cli_train.EXAMPLES))
    _add_eval(commands)
    plan = "bytes and hours of a large run on 1, 8, 64 ... GPUs"
    cli_plan.add_arguments(_add(commands, "plan", cli_plan.run, plan, cli_plan.EXAMPLES))
    _add_bench(commands)
    info = _add(commands, "info", _info, "versions, devices, the native library, the backend", None)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add(commands, name, run, summary, examples, description=None) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show the whole Python error instead of one line")
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands) -> None:
    parser = _add(
        commands, "demo", _demo, "recommender, SAE, named latents and steering, with a report", DEMO_EXAMPLES,
        "Trains a recommender, inserts a sparse autoencoder, measures what that costs, names its latents, steers\n"
        "recommendations with them, and writes a checkpoint, metrics.json and report.html.",
    )  # fmt: skip
    data = parser.add_argument_group("data (none: a simulated catalogue whose concepts are known)")
    source = data.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder laid out as goodbooks10k, ml1m or ml_latest_small"
    )
    source.add_argument(
        "--interactions", type=Path, metavar="FILE", help="a Parquet or CSV file, one row per (user, item)"
    )
    for name in ("user", "item", "rating", "time"):
        data.add_argument(f"--{name}-col", metavar="NAME", help=f"its column of {name}s")
    data.add_argument("--min-rating", type=float, metavar="R", help="keep ratings of R and more")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=("elsa", "multvae", "sasrec"), default="elsa", help="the recommender (elsa)")
    model.add_argument("--d", type=int, help="size of its embedding (elsa 256, multvae 128, sasrec 64; simulated: 64)")
    model.add_argument("--epochs", type=int, help="passes over the users while training it (by model and data)")
    sae = parser.add_argument_group("sparse autoencoder")
    sae.add_argument("--width", type=int, help="latents per dimension of the embedding (8; simulated: 4)")
    sae.add_argument("--k", type=int, help="active latents per row (32; simulated: 16)")
    sae.add_argument("--steps", type=int, help="training steps of 1,024 rows (6000; simulated: 2000)")
    sae.add_argument(
        "--normalize", choices=cli_train.NORMALIZERS, default="standardize", help="input normaliser (standardize)"
    )
    sae.add_argument(
        "--refit", type=int, default=4, metavar="N", help="steps that fit a code's values to the input (4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the run is written (runs/demo-<model>)")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and tables")


def _add_eval(commands) -> None:
    parser = _add(commands, "eval", _eval, "FVU, cosine, L0 and dead share of a checkpoint", EVAL_EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder written by train or demo")
    activations = (
        "a store of activations (a folder or URL), or .npy, .npz, .safetensors or .pt with [rows, d_in] floats"
    )
    parser.add_argument("activations", help=activations)
    parser.add_argument("--key", help="which array of a file with several")
    parser.add_argument("--device", help="where to compute: cpu, cuda, ... (cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quiet", action="store_true", help="print the JSON only")


def _add_bench(commands) -> None:
    parser = _add(
        commands, "bench", _bench, "time and memory of the kernels against torch and other libraries", BENCH_EXAMPLES
    )
    parser.add_argument("--full", action="store_true", help="every case and provider, with memory")
    parser.add_argument("--op", action="append", metavar="OP", help="this op only (again for more)")
    parser.add_argument("--case", action="append", metavar="CASE", help="this case only (again for more)")
    parser.add_argument("--provider", action="append", metavar="NAME", help="this provider only (again for more)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="threads torch may use (its own default)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="CSV goes to DIR/<device>/<op>.csv (runs/bench; with --full benchmarks/results)",
    )
    parser.add_argument(
        "--base", metavar="REV", help="measure this commit's kernels too, built in a throw-away worktree"
    )
    parser.add_argument("--scaling", action="store_true", help="sweep one size at a time and fit exponents")
    parser.add_argument("--list", action="store_true", help="list cases, ops and providers")


def _demo(options: argparse.Namespace) -> int:
    from .experiments.demo import DemoConfig, run_demo

    names = DemoConfig.__dataclass_fields__
    run_demo(DemoConfig(**{name: value for name, value in vars(options).items() if name in names}))
    return 0


def _eval(options: argparse.Namespace) -> int:
    from .eval.reconstruction import evaluate_reconstruction
    from .train import load_sae

    sae = load_sae(options.checkpoint)
    figures = evaluate_reconstruction(sae.to(options.device), _activations(options.activations, options.key))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures) if options.quiet else cli_train.table(figures))
    return 0


def _activations(place: str, key: str | None) -> "Tensor | Iterator[Tensor]":
    """The matrix in a file, or those of a store's shards one after another."""
    if "://" not in place and not Path(place).is_dir():
        from .train.activations import load_activations

        return load_activations(place, key)
    from .data.store import ActivationStore

    store = ActivationStore.open(place)
    if key is not None:
        raise ValueError(f"--key is for files; {place} is a store")
    if store.kind != "activations":
        raise ValueError(f"{place} is a store of {store.kind}; eval takes activations")
    return (store.shard(number)["x"] for number in range(len(store.shards)))


def _bench(options: argparse.Namespace) -> int:
    from .bench.runner import main as run_bench

    return run_bench(options)


def _info(options: argparse.Namespace) -> int:
    from ._info import format_info, info

    facts = info()
    print(json.dumps(facts, indent=2) if options.json else format_info(facts))
    return 0
