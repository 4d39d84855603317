"""sae-kernels extract: a model, its inputs and a store, from the command line."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  sae-kernels extract --sasrec sasrec.npz --data data/ml1m --out acts           SASRec's last hidden states, no padding
  sae-kernels extract --model mine:make_model --inputs mine:make_inputs --module encoder.3 --out acts
  sae-kernels extract --model mine:make_model --inputs log.parquet --columns items --prepare mine:pad \\
                      --mask mine:real --module encoder --dtype bfloat16 --out s3://bucket/acts
  sae-kernels extract --hf gpt2 --inputs texts.parquet --columns title --module model.h.6 --out acts
  sae-kernels extract ... --sae runs/sae --out codes                             k values and indices, not d numbers
  sae-kernels extract ... --engine ray --workers 8                               Ray Data; the cluster of RAY_ADDRESS
  torchrun --nproc-per-node 8 -m sae_kernels extract ... --engine torchrun

Cut at any moment, the same command goes on. mine:make_model is a function without arguments in mine.py (or an
installed module) that returns the model; mine:make_inputs returns tensors, a Dataset, a DataLoader or an iterable;
mine:pad takes a batch and returns what the model takes; mine:real takes what the model takes and is True where a
position is real. --verify and --repair look after a store that is there.
"""
DTYPES = ("float32", "float16", "bfloat16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model (one of three)")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="MODULE:FUNCTION", help="what makes your model")
    which.add_argument("--sasrec", type=Path, metavar="FILE", help="a published SASRec state dict (.npz); needs --data")
    which.add_argument("--hf", metavar="NAME", help="a Hugging Face model; needs --inputs with texts and --columns")
    model.add_argument("--module", metavar="NAME", help="whose output is stored (sasrec: norm; hf: last_hidden_state)")
    model.add_argument("--list-modules", action="store_true", help="print the names of the model's modules and stop")
    model.add_argument("--device", help="cpu or cuda (where the model is)")
    model.add_argument("--autocast", choices=DTYPES[1:3], help="run the model in this dtype")
    model.add_argument("--sae", type=Path, metavar="DIR", help="checkpoint of an SAE: store its codes instead")
    data = parser.add_argument_group("inputs")
    data.add_argument("--inputs", metavar="FILE|MODULE:FUNCTION", help="a .parquet file, or what makes the inputs")
    data.add_argument("--columns", nargs="+", metavar="NAME", help="columns of the .parquet file (all)")
    data.add_argument("--data", type=Path, metavar="DIR", help="a folder of interactions, for --sasrec")
    data.add_argument("--prepare", metavar="MODULE:FUNCTION", help="a batch -> what the model takes")
    data.add_argument("--mask", metavar="MODULE:FUNCTION", help="what the model takes -> True where a position is real")
    data.add_argument("--positions", choices=("all", "last"), default="all", help="rows of a sequence (all)")
    data.add_argument("--batch-size", type=int, default=256, metavar="N", help="inputs in a forward pass (256)")
    data.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a text, for --hf (256)")
    data.add_argument("--nan", choices=("raise", "drop", "keep"), default="raise", help="rows with NaN or Inf (raise)")
    store = parser.add_argument_group("store")
    store.add_argument("--out", metavar="STORE", help="a folder or a URL such as s3://bucket/acts")
    store.add_argument("--dtype", choices=DTYPES, help="stored dtype (as the model puts it out)")
    store.add_argument("--shuffle", type=int, metavar="SEED", help="batches and rows in a random order")
    store.add_argument("--shard-mb", type=float, default=64, metavar="MB", help="size of a shard, at most (64)")
    store.add_argument("--append", action="store_true", help="add these inputs to a finished store")
    store.add_argument("--first-id", type=int, default=0, metavar="N", help="what the inputs' ids count from (0)")
    store.add_argument("--verify", action="store_true", help="read the whole store and name damaged shards")
    store.add_argument("--repair", action="store_true", help="make damaged shards anew")
    store.add_argument(
        "--storage-options", type=json.loads, metavar="JSON", help="for fsspec, such as endpoint and key"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("local", "torchrun", "ray"), default="local", help="where it runs (local)")
    engine.add_argument("--workers", type=int, default=1, metavar="N", help="actors of --engine ray (1)")
    engine.add_argument("--writers", type=int, default=1, metavar="N", help="threads that write (1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Extracts, verifies or repairs; 2 where --verify finds damage."""
    if options.verify:
        return _verify(options)
    make_model, inputs, known = _source(options)
    if options.list_modules:
        print("\n".join(name for name, _ in make_model().named_modules() if name))
        return 0
    for name in ("out", "module"):
        if getattr(options, name) is None and name not in known:
            raise ValueError(f"--{name} is missing")
    try:
        return _extract(options, make_model, inputs, known)
    except (TypeError, RuntimeError) as error:  # a model, a module and inputs that do not go together
        raise ValueError(str(error)) from error


def _extract(options: argparse.Namespace, make_model: Any, inputs: Any, known: dict[str, Any]) -> int:
    from .data.extract import extract, repair

    arguments = _arguments(options, known)
    if options.repair:
        done = repair(make_model, arguments.pop("module"), inputs, options.out, **arguments)
        print(f"{options.out}: {len(done)} shards were made anew{': ' if done else ''}{', '.join(map(str, done))}")
        return 0
    store = extract(make_model, arguments.pop("module"), inputs, options.out, **arguments)
    if int(os.environ.get("RANK", 0)) == 0:
        dropped = sum(shard.dropped for shard in store.shards)
        print(f"{store}{f', {dropped:,} rows dropped' if dropped else ''}")
    return 0


def _source(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """A function that makes the model, the inputs, and what follows from the kind of model."""
    if options.sasrec is not None:
        return _sasrec(options)
    if options.hf is not None:
        return _hugging_face(options)
    if options.model is None:
        raise ValueError("one of --model, --sasrec and --hf is missing")
    if options.inputs is None and not options.list_modules:
        raise ValueError("--inputs is missing")
    inputs = options.inputs
    if inputs is not None and not inputs.endswith(".parquet"):
        inputs = _function("--inputs", inputs)()
    return _on(options, _function("--model", options.model)), inputs, {}


def _sasrec(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import numpy
    import torch

    from .data import load
    from .data.extract import CallableInputs
    from .recommenders import SASRec

    if options.data is None:
        raise ValueError("--sasrec needs --data, a folder such as ml1m")
    if not options.sasrec.is_file():
        raise FileNotFoundError(f"{options.sasrec}: no such file")

    def make() -> SASRec:
        return SASRec.from_state(numpy.load(options.sasrec, allow_pickle=False))

    model, histories = make(), load(options.data).histories()
    if histories.n_items > model.n_items:
        raise ValueError(f"{options.data} has {histories.n_items} items, the model of {options.sasrec} {model.n_items}")
    length = model.max_len
    inputs = CallableInputs(
        lambda start, stop: histories.padded(torch.arange(start, stop), length),
        len(histories),
        options.batch_size,
        f"{options.data.name}, the last {length} items",
    )
    return _on(options, make), inputs, {"module": "norm", "mask": _not_padding}


def _not_padding(sequence: Any) -> Any:
    return sequence != 0


def _hugging_face(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    from .data.extract.hugging_face import LAST_HIDDEN, HuggingFace, text_inputs
    from .data.read import read_table

    known = {"module": LAST_HIDDEN, "mask": HuggingFace.mask}
    if options.list_modules:
        return lambda: HuggingFace.load(options.hf), None, known
    if options.inputs is None or options.columns is None or len(options.columns) != 1:
        raise ValueError("--hf needs --inputs, a .parquet or .csv file, and --columns with the name of its texts")
    columns = options.columns
    texts = read_table(Path(options.inputs), columns, columns, as_they_stand=True)[columns[0]].tolist()
    inputs = text_inputs(texts, options.hf, options.batch_size, options.max_tokens)
    return _on(options, lambda: HuggingFace.load(options.hf)), inputs, known


def _on(options: argparse.Namespace, make: Any) -> Any:
    """make, with the model moved to --device."""
    if options.device is None:
        return make
    from .data.engines.torchrun import local_device

    device = local_device(options.device) if options.engine == "torchrun" else options.device
    return lambda: make().to(device)


def _arguments(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    import torch

    same = ("batch_size", "positions", "nan", "shuffle", "shard_mb", "append", "first_id", "storage_options", "engine")
    arguments = {name: getattr(options, name) for name in (*same, "workers", "writers", "device")}
    for name in ("dtype", "autocast"):
        value = getattr(options, name)
        arguments[name] = None if value is None else getattr(torch, value)
    for name in ("prepare", "mask"):
        value = getattr(options, name)
        arguments[name] = known.get(name) if value is None else _function(f"--{name}", value)
    if options.hf is None and options.sasrec is None:
        arguments["columns"] = options.columns
    if options.sae is not None:
        from .train import load_sae

        arguments["sae"] = load_sae(options.sae, options.device or "cpu")
    module = options.module or known["module"]
    return {**arguments, "module": module, "progress": not options.quiet}


def _verify(options: argparse.Namespace) -> int:
    from .data.store import ActivationStore

    if options.out is None:
        raise ValueError("--out is missing")
    store = ActivationStore.open(options.out, options.storage_options)
    damaged = store.verify()
    for damage in damaged:
        print(damage, file=sys.stderr)
    print(f"{store}: {len(damaged)} of {len(store.shards)} shards are damaged")
    return 2 if damaged else 0


def _function(option: str, reference: str) -> Any:
    """The function behind MODULE:FUNCTION; modules of the current folder are found too."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{option} must be MODULE:FUNCTION, got {reference!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"{option}: there is no module {module!r} here or installed") from None
    except AttributeError:
        raise ValueError(f"{option}: {module!r} has no {name!r}") from None
    if not callable(found):
        raise ValueError(f"{option}: {reference!r} is a {type(found).__name__}, not a function")
    return found
