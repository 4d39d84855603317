"""python -m sae_kernels.experiments accuracy | grid | study: one command each."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m sae_kernels.experiments grid                                    ELSA on the simulated catalogue
  python -m sae_kernels.experiments grid --data data/goodbooks10k --model multvae --d 128 --seeds 0 1 2
  python -m sae_kernels.experiments grid --data data/ml1m --model sasrec --weights sasrec.npz --at 10 --variants topk
  python -m sae_kernels.experiments accuracy --data data/goodbooks10k --sequences data/ml1m --weights sasrec.npz
  python -m sae_kernels.experiments study runs/demo-elsa                   what its latents mean, explain and steer
  python -m sae_kernels.experiments study --data data/goodbooks10k --seeds 0 1 2      three runs, mean and spread

Ctrl-C at any time: the same command goes on with what is missing. Open <out>/results.html or <out>/summary.html.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a mistake in what was given, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    return {"accuracy": _accuracy, "grid": _grid, "study": _study}[options.command](options)


def _accuracy(options: argparse.Namespace) -> int:
    from .accuracy import AccuracyConfig, run_accuracy
    from .grid_page import spread

    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    del given["command"]
    try:
        lines = run_accuracy(AccuracyConfig(**given))
    except (ValueError, OSError, ImportError) as error:
        print(f"experiments accuracy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nexperiments accuracy: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if not options.quiet:
        print(f"{'recommender':<14}{'variant':<18}{'base':>18}{'kept':>18}{'FVU':>18}{'dead':>8}")
        for line in lines:
            base, kept, fvu = (spread(line.values(name), 4) for name in ("base_ndcg", "kept", "fvu"))
            dead = sum(line.values("dead_share")) / len(line.cells)
            print(f"{line.name:<14}{line.variant:<18}{base:>18}{kept:>18}{fvu:>18}{dead:>8.2%}")
        print(f"results: {options.out / 'results.html'}")
    return 0


def _study(options: argparse.Namespace) -> int:
    from .studies import StudiesConfig, run_studies
    from .study import StudyConfig, run_study

    runs = tuple(options.runs)
    study = {name: getattr(options, name) for name in ("users", "explained", "untagged", "resamples")}
    try:
        if runs and (options.seeds or options.data):
            raise ValueError("RUN are made already; --data and --seeds make their own")
        if len(runs) == 1:
            run_study(StudyConfig(runs[0], options.out, **study))
        else:
            out = options.out or Path(f"runs/study-{options.model}")
            seeds = tuple(options.seeds or (0, 1, 2))
            run_studies(StudiesConfig(out, runs, options.data, options.model, seeds, study))
    except (ValueError, OSError, ImportError) as error:
        print(f"experiments study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nexperiments study: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _grid(options: argparse.Namespace) -> int:
    from .grid import GridConfig, run_grid
    from .grid_page import spread

    names = GridConfig.__dataclass_fields__
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    config = GridConfig(**{name: value for name, value in given.items() if name in names})
    try:
        results = run_grid(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"experiments grid: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nexperiments grid: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if not config.quiet:
        print(f"{'variant':<18}{'width':>6}{'k':>5}{'kept':>18}{'dead':>8}")
        for variant, width, k in dict.fromkeys((one.variant, one.width, one.k) for one in results):
            here = [one for one in results if (one.variant, one.width, one.k) == (variant, width, k)]
            dead = sum(one.dead_share for one in here) / len(here)
            print(f"{variant:<18}{width:>5}x{k:>5}{spread([one.kept for one in here], 3):>18}{dead:>8.2%}")
        print(f"results: {config.filled().out / 'results.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_kernels.experiments",
        description="Reproduction runs, resumable, with CSV, plots and a results page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_accuracy(commands)
    _add_study(commands)
    grid = commands.add_parser(
        "grid", help="SAE variants x width x k x seeds on one recommender", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    grid.add_argument("--data", type=Path, metavar="DIR", help="a goodbooks10k, ml1m or ml_latest_small folder")
    grid.add_argument("--model", choices=("elsa", "multvae", "sasrec"), default="elsa", help="the recommender (elsa)")
    grid.add_argument("--d", type=int, help="size of its embedding (by model and data, as in the demo)")
    grid.add_argument("--epochs", type=int, help="passes over the users while training it (by model and data)")
    grid.add_argument("--weights", type=Path, metavar="FILE", help="a published SASRec (.npz) in place of one's own")
    grid.add_argument("--variants", nargs="+", metavar="NAME",
                      help="topk, topk-global, topk-raw, topk-abs, batch-topk, jumprelu; published-l2, "
                      "published-cosine; repaired-l2, repaired-cosine; each also with -refit: the same SAE, its "
                      "values fitted to the input (topk topk-refit; but for sasrec the published too)")  # fmt: skip
    grid.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64], help="active latents (8 16 32 64)")
    grid.add_argument("--width", type=int, nargs="+", default=[2, 4, 8], help="latents per dimension (2 4 8)")
    grid.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data split, recommender and SAE (0)")
    grid.add_argument("--steps", type=int, help="training steps of each SAE (6000; simulated: 2000)")
    grid.add_argument("--at", type=int, default=20, metavar="N", help="length of the scored lists (20)")
    grid.add_argument("--out", type=Path, metavar="DIR", help="where the grid is written (runs/grid-<model>)")
    grid.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    return parser


def _add_accuracy(commands: argparse._SubParsersAction) -> None:
    accuracy = commands.add_parser("accuracy", help="what one SAE costs ELSA, MultVAE and SASRec, over seeds")
    accuracy.add_argument("--data", type=Path, metavar="DIR", help="ratings for ELSA and MultVAE (the simulation)")
    accuracy.add_argument("--sequences", type=Path, metavar="DIR", help="a set with a time order for SASRec (none)")
    accuracy.add_argument("--weights", type=Path, metavar="FILE", help="a published SASRec (.npz)")
    accuracy.add_argument("--latents", type=int, nargs="+", default=[64, 128, 200], metavar="D",
                          help="sizes of MultVAE's embedding (64 128 200)")  # fmt: skip
    accuracy.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, recommender, SAE (0 1 2)")
    accuracy.add_argument("--k", type=int, default=32, help="active latents (32)")
    accuracy.add_argument("--width", type=int, default=8, help="latents per dimension (8)")
    accuracy.add_argument("--steps", type=int, help="training steps of each SAE (6000; simulated: 2000)")
    accuracy.add_argument("--out", type=Path, default=Path("runs/accuracy"), metavar="DIR", help="(runs/accuracy)")
    accuracy.add_argument("--quiet", action="store_true", help="no progress bar and no table")


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study", help="concepts, latents, explanations and steering of runs of the demo", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    study.add_argument("runs", type=Path, nargs="*", metavar="RUN",
                       help="folders that the demo has written; none: they are made, one per seed")  # fmt: skip
    study.add_argument("--data", type=Path, metavar="DIR", help="without RUN: a goodbooks10k, ml1m or ml_latest_small "
                       "folder (a simulated catalogue)")  # fmt: skip
    study.add_argument("--model", choices=("elsa", "multvae", "sasrec"), default="elsa",
                       help="without RUN: the recommender (elsa)")  # fmt: skip
    study.add_argument("--seeds", type=int, nargs="+", help="without RUN: of data split, recommender and SAE (0 1 2)")
    study.add_argument("--out", type=Path, metavar="DIR",
                       help="where tables and pages go (RUN/study; of several runs: runs/study-<model>)")  # fmt: skip
    study.add_argument("--users", type=int, default=2000, help="held-out users that are steered (2000)")
    study.add_argument("--explained", type=int, default=5, help="recommendations that are explained (5)")
    study.add_argument("--untagged", type=float, default=0.0, metavar="SHARE",
                       help="share of the items whose tags the methods do not see (0)")  # fmt: skip
    study.add_argument("--resamples", type=int, default=200, help="of the bootstrap (200)")


if __name__ == "__main__":
    sys.exit(main())
