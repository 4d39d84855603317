"""One training loop for every source of activations; an interrupted run goes on bit for bit where it stopped."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._need import need
from .checkpoint import check_replaceable, uncompiled
from .member import Member
from .ranks import Ranks
from .recipe import Recipe
from .run import Run
from .sources import as_batch, as_source, part_of


@dataclass
class FitResult:
    """history: a dict per log_every steps; steps done; seconds of this call; stopped: "finished" or "early stopping";
    best: the best validation."""

    history: list[dict[str, float]]
    steps: int
    seconds: float
    stopped: str
    best: float | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`; `checkpoint` is the folder that resumes (None where no checkpoint was asked for)."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        kept = f"; {checkpoint} resumes it" if checkpoint else "; no checkpoint was asked for"
        super().__init__(f"training was interrupted after step {step}{kept}")
        self.step, self.checkpoint = step, checkpoint


@overload
def fit(sae: nn.Module, source: object, **options: Any) -> FitResult: ...


@overload
def fit(sae: Mapping[str, nn.Module], source: object, **options: Any) -> dict[str, FitResult]: ...


def fit(
    sae: nn.Module | Mapping[str, nn.Module],
    source: object,
    *,
    steps: int,
    batch_size: int = 1024,
    lr: float | Mapping[str, float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: float = 0.05,
    decay: float = 0.2,
    clip: float | None = 1.0,
    seed: int = 0,
    log: Callable[[dict[str, Any]], object] | None = None,
    log_every: int = 50,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    validate: Tensor | Callable[[nn.Module], float] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> FitResult | dict[str, FitResult]:
    """Trains a TopKSAE with Adam on `source`, decoder rows kept at unit norm.

    source: a tensor [rows, d_in] (shuffled epochs), an iterable of batches [..., d_in], a callable(step, generator) ->
    batch, `from_model(...)` or a `ShuffledReader`; batch_size is of use for a tensor only. warmup and decay are
    shares of `steps`: the learning rate rises linearly to lr and falls linearly to 0. clip: the largest gradient norm,
    or None. compute_dtype: losses and gradients are computed in it (bfloat16), weights and Adam kept as they are.
    log gets every history row: step, loss, fvu, aux, l0 (means since the last row), dead_share, lr (and validation).
    validate: held-out activations [rows, d_in] (their FVU) or a callable(sae) -> float, lower is better, run every
    validate_every steps; patience: stop after so many validations without a better one. The best weights are put back.
    checkpoint: a folder, written every checkpoint_every steps, at the end and on Ctrl-C (raised on as `Interrupted`).
    resume=True goes on from it: the result equals the uninterrupted run's bit for bit on the same device and threads.

    A dict of SAEs is a grid: all are trained on the same batches, in one pass, each with its own lr where lr is a dict;
    a result comes back per name, rows that are logged carry it as "sae", and checkpoint/<name> is an SAE's own.

    group: the processes (of torchrun, say) that take each a part of every batch; they start from the first one's
    weights. batch_size is that of all together: the result is that of one process but for rounding, and a run goes on
    on any number of them. Not so of a `BatchTopKSAE`, whose processes choose each over its own part of the batch, and
    of the first thresholds of a `JumpReLUSAE`, the mean of what the parts give. A `ShardedTopKSAE` brings the group of
    those that share its latents.

    The same seed gives the same bits; the caller's random state is left as it was. Raises ValueError naming an argument
    that is out of range, or what differs from the run to be resumed; FloatingPointError where the loss is not finite,
    and before a checkpoint would be written of weights that are not.
    """
    saes = {"": sae} if isinstance(sae, nn.Module) else _checked_grid(sae)
    saes = {name: uncompiled(one) for name, one in saes.items()}
    if len({id(one) for one in saes.values()}) < len(saes):
        raise ValueError("the SAEs of a grid are trained each by itself, and one module is in it under several names")
    rates = _rates(lr, saes)
    validate_every = validate_every or (log_every if validate is not None else None)
    _check(validate, validate_every, patience, checkpoint, checkpoint_every, resume)
    dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    recipe = Recipe(
        steps, batch_size, rates[next(iter(saes))], betas, warmup, decay, clip, seed, log_every, validate_every,
        patience, dtype, "",
    )  # fmt: skip
    first = next(iter(saes.values()))
    device = torch.device(device) if device is not None else next(first.parameters()).device
    ranks = Ranks(group, getattr(first, "shard_group", None))
    feed = part_of(as_source(source, recipe.batch_size, recipe.seed), *ranks.part)
    recipe = replace(recipe, source=feed.describe())
    members = {name: Member(m, replace(recipe, lr=rates[name]), ranks, device, name) for name, m in saes.items()}
    if isinstance(validate, Tensor):
        validate = _held_out_fvu(validate, device)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and ranks.main:
        check_replaceable(path, "" not in saes)  # not when all is done
    run = Run(members, feed, ranks, recipe, validate, log, path, checkpoint_every)
    started = time.perf_counter()
    _train(run, resume, progress)
    seconds = time.perf_counter() - started
    results = {name: _result(member, seconds) for name, member in members.items()}
    return results[""] if isinstance(sae, nn.Module) else results


def _checked_grid(saes: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if not isinstance(saes, Mapping) or not saes:
        raise TypeError(f"sae must be a TopKSAE or a dict of named ones, got {type(saes).__name__}")
    for name in saes:
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"a name in a grid is made of letters, digits, '-', '_' and '.', got {name!r}")
    widths = {name: sae.d_in for name, sae in saes.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"the SAEs of a grid see the same batches: one d_in, got {widths}")
    if len({getattr(sae, "shard_group", None) for sae in saes.values()}) > 1:
        raise ValueError("the SAEs of a grid must all be whole, or all be spread over the same processes")
    return dict(saes)


def _rates(lr: float | Mapping[str, float], saes: Mapping[str, nn.Module]) -> dict[str, float]:
    rates = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(saes, lr)
    if rates.keys() != saes.keys():
        raise ValueError(f"lr is given for {sorted(rates)} and the grid is {sorted(saes)}")
    return rates


def _check(validate, validate_every, patience, checkpoint, checkpoint_every, resume) -> None:
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 or None, got {checkpoint_every}")
    if (resume or checkpoint_every) and checkpoint is None:
        raise ValueError("resume and checkpoint_every need checkpoint, the folder to read and write")
    if validate is None and (patience or validate_every):
        raise ValueError("patience and validate_every need validate: held-out activations or a callable")


def _held_out_fvu(held_out: Tensor, device: torch.device) -> Callable[[nn.Module], float]:
    from ..eval.reconstruction import evaluate_reconstruction

    return lambda sae: evaluate_reconstruction(sae, held_out, device=device)["fvu"]


def _result(member: Member, seconds: float) -> FitResult:
    stopped = "early stopping" if member.stopped else "finished"
    return FitResult(member.history, member.steps, seconds, stopped, member.best)


def _train(run: Run, resume: bool, progress: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []))
        interrupted = stack.enter_context(_deferred_interrupt())
        for member in run.members.values():
            stack.enter_context(member)
        torch.manual_seed(run.recipe.seed)
        if resume:
            run.restore()
        bar = stack.enter_context(_bar(run, progress and run.ranks.main))
        while run.step < run.recipe.steps and run.active:
            # asked before a batch is drawn: one that was drawn and not used would be lost to the resumed run
            batch = None if _stops(run, interrupted) else _next(run)
            if batch is None:
                run.save()
                raise Interrupted(run.step, run.checkpoint)
            _advance(run, batch, bar)
        for member in run.members.values():
            member.put_best_back()
        run.save()
        if run.ranks.any(interrupted.is_set(), run.device):
            raise Interrupted(run.step, run.checkpoint)


def _next(run: Run) -> Tensor | None:
    try:
        return as_batch(run.source.next())
    except StopIteration:
        raise ValueError(f"source ended after {run.step} batches; give one that lasts for all steps") from None
    except KeyboardInterrupt:
        if run.ranks.groups:  # the others know nothing of it, and saving is for all
            raise
        return None


def _stops(run: Run, interrupted: threading.Event) -> bool:
    """Whether Ctrl-C was pressed. Several processes agree where they meet anyway: after a history row."""
    if not run.ranks.groups:
        return interrupted.is_set()
    if run.step % run.recipe.log_every:
        return False
    return run.ranks.any(interrupted.is_set(), run.device)


def _advance(run: Run, batch: Tensor, bar: Any) -> None:
    recipe, rows = run.recipe, {}
    active = run.active
    for member in active.values():
        member.step(batch)
    run.step += 1
    for name, member in active.items():
        row = member.row() if run.step % recipe.log_every == 0 or run.step == recipe.steps else None
        if run.validate is not None and run.step % recipe.validate_every == 0:
            row = {**(row or {"step": run.step}), "validation": member.validated(run.validate)}
        if row is not None:
            member.history.append(row)
            rows[name] = row
    _publish(run, rows, bar)
    if run.checkpoint_every and run.step % run.checkpoint_every == 0 and run.step < recipe.steps:
        run.save()
    bar.update(1)


def _publish(run: Run, rows: dict[str, dict[str, float]], bar: Any) -> None:
    if not run.ranks.main:
        return
    for name, row in rows.items():
        if run.log is not None:
            run.log({"sae": name, **row} if name else dict(row))
    if len(rows) == 1:
        row = next(iter(rows.values()))
        shown = {name: f"{row[name]:.4g}" for name in ("loss", "fvu", "l0", "dead_share") if name in row}
    else:
        shown = {name: f"{row['fvu']:.4g}" for name, row in rows.items() if "fvu" in row}
    if rows:
        bar.set_postfix(shown, refresh=False)


class _Silent:
    def update(self, n: int) -> None: ...

    def set_postfix(self, values: dict[str, str], refresh: bool) -> None: ...


@contextmanager
def _bar(run: Run, progress: bool) -> Iterator[Any]:
    if not progress:
        yield _Silent()
        return
    tqdm = need("tqdm", "the progress bar (progress=True)", "train").tqdm
    with tqdm(total=run.recipe.steps, initial=run.step, desc="SAE", unit="step") as bar:
        yield bar


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, which the loop reads between two steps; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    if before is not signal.default_int_handler:
        yield event
        return

    def handle(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
