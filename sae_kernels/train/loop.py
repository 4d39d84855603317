"""One training loop for every source of activations; an interrupted run goes on bit for bit where it stopped."""

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import find_folder, load_weights, need, read_training, write_folder
from .sources import Source, as_source

COLUMNS = ("loss", "fvu", "aux", "l0")


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


@dataclass(frozen=True)
class _Plan:
    """What decides the numbers of a run: a resumed one must agree on all of it."""

    steps: int
    batch_size: int
    lr: float
    betas: tuple[float, float]
    warmup: float
    decay: float
    clip: float | None
    seed: int
    log_every: int
    validate_every: int | None
    patience: int | None
    source: str

    def factor(self, step: int) -> float:
        """The share of lr at `step`: up over the warm-up, flat, then linearly to 0 over the decay."""
        rise, fall = round(self.warmup * self.steps), round(self.decay * self.steps)
        up = min(1.0, (step + 1) / rise) if rise else 1.0
        down = min(1.0, (self.steps - step) / fall) if fall else 1.0
        return max(0.0, min(up, down))


@dataclass
class _State:
    """Everything that changes from step to step beside the module itself."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    window: Tensor
    source: Source
    step: int = 0
    window_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    bad: int = 0
    best_weights: dict[str, Any] | None = None


def fit(
    sae: nn.Module,
    source: object,
    *,
    steps: int,
    batch_size: int = 1024,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: float = 0.05,
    decay: float = 0.2,
    clip: float | None = 1.0,
    seed: int = 0,
    log: Callable[[dict[str, float]], object] | None = None,
    log_every: int = 50,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    validate: Tensor | Callable[[nn.Module], float] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    device: torch.device | str | None = None,
) -> FitResult:
    """Trains a TopKSAE with Adam on `source`, decoder rows kept at unit norm.

    source: a tensor [rows, d_in] (shuffled epochs), an iterable of batches [..., d_in], a callable(step, generator) ->
    batch, or `from_model(...)`; batch_size is of use for a tensor only. warmup and decay are shares of `steps`: the
    learning rate rises linearly to lr and falls linearly to 0. clip: the largest gradient norm, or None.
    log gets every history row: step, loss, fvu, aux, l0 (means since the last row), dead_share, lr (and validation).
    validate: held-out activations [rows, d_in] (their FVU) or a callable(sae) -> float, lower is better, run every
    validate_every steps; patience: stop after so many validations without a better one. The best weights are put back.
    checkpoint: a folder, written every checkpoint_every steps, at the end and on Ctrl-C (raised on as `Interrupted`).
    resume=True goes on from it: the result equals the uninterrupted run's bit for bit on the same device and threads.

    The same seed gives the same bits; the caller's random state is left as it was. Raises ValueError naming an argument
    that is out of range, or what differs from the run to be resumed; FloatingPointError where the loss is not finite.
    """
    validate_every = validate_every or (log_every if validate is not None else None)
    device = torch.device(device) if device is not None else next(sae.parameters()).device
    sae.to(device).train()
    feed = as_source(source, batch_size, seed)
    plan = _Plan(
        steps,
        batch_size,
        lr,
        tuple(betas),
        warmup,
        decay,
        clip,
        seed,
        log_every,
        validate_every,
        patience,
        feed.describe(),
    )
    _check(plan, validate, checkpoint, checkpoint_every, resume)
    if isinstance(validate, Tensor):
        validate = _held_out_fvu(validate, device)
    path = None if checkpoint is None else Path(checkpoint)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=plan.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.factor)
    state = _State(optimizer, scheduler, torch.zeros(len(COLUMNS), dtype=torch.float64, device=device), feed)
    devices = [device] if device.type == "cuda" else []
    started, handle = time.perf_counter(), sae.constrain(optimizer)
    try:
        with torch.random.fork_rng(devices=devices), _deferred_interrupt() as interrupted:
            torch.manual_seed(seed)
            if resume:
                _restore(path, sae, plan, state, device)
            stopped = _run(sae, plan, state, path, checkpoint_every, validate, log, progress, interrupted)
    finally:
        handle.remove()
    return FitResult(state.history, state.step, time.perf_counter() - started, stopped, state.best)


def _check(plan: _Plan, validate, checkpoint, checkpoint_every, resume) -> None:
    _check_schedule(plan)
    for name in ("steps", "batch_size", "log_every"):
        value = getattr(plan, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    for name, value in (
        ("checkpoint_every", checkpoint_every),
        ("patience", plan.patience),
        ("validate_every", plan.validate_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {value}")
    if (resume or checkpoint_every) and checkpoint is None:
        raise ValueError("resume and checkpoint_every need checkpoint, the folder to read and write")
    if validate is None and (plan.patience or plan.validate_every):
        raise ValueError("patience and validate_every need validate: held-out activations or a callable")


def _check_schedule(plan: _Plan) -> None:
    if not plan.lr > 0:
        raise ValueError(f"lr must be above 0, got {plan.lr}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(plan, name) <= 1:
            raise ValueError(f"{name} is a share of the steps, 0 to 1, got {getattr(plan, name)}")
    if plan.clip is not None and not plan.clip > 0:
        raise ValueError(f"clip must be above 0 or None, got {plan.clip}")


def _held_out_fvu(held_out: Tensor, device: torch.device) -> Callable[[nn.Module], float]:
    from ..eval.reconstruction import evaluate_reconstruction

    return lambda sae: evaluate_reconstruction(sae, held_out, device=device)["fvu"]


def _run(sae, plan, state, path, checkpoint_every, validate, log, progress, interrupted) -> str:
    bar = _bar(plan.steps, state.step, progress)
    try:
        # a resumed run that had already stopped early has nothing left to do
        stopped = plan.patience is not None and state.bad >= plan.patience
        while state.step < plan.steps and not stopped:
            # asked before a batch is drawn: one that was drawn and not used would be lost to the resumed run
            batch = None if interrupted.is_set() else _next(state.source)
            if batch is None:
                _save(path, sae, plan, state)
                raise Interrupted(state.step, path)
            _step(sae, plan, state, batch)
            row = _log_row(sae, plan, state)
            if validate is not None and state.step % plan.validate_every == 0:
                row = {**(row or {"step": state.step}), "validation": _validation(sae, state, validate, plan.patience)}
                stopped = plan.patience is not None and state.bad >= plan.patience
            _publish(row, state, log, bar)
            if checkpoint_every and state.step % checkpoint_every == 0 and state.step < plan.steps:
                _save(path, sae, plan, state)
            bar.update(1)
    finally:
        bar.close()
    if state.best_weights is not None:
        sae.load_state_dict(state.best_weights)
    _save(path, sae, plan, state)
    return "early stopping" if stopped else "finished"


def _next(source: Source) -> Tensor | None:
    try:
        return source.next()
    except KeyboardInterrupt:
        return None


def _step(sae: nn.Module, plan: _Plan, state: _State, batch: Tensor) -> None:
    parameter = next(sae.parameters())
    out = sae.loss(batch.to(parameter.device, parameter.dtype, non_blocking=True))
    state.optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    if plan.clip is not None:
        nn.utils.clip_grad_norm_(sae.parameters(), plan.clip)
    state.optimizer.step()
    state.scheduler.step()
    # kept on the device: reading them is what would make the host wait
    state.window += torch.stack([out.loss.detach(), out.mse.detach(), out.aux.detach(), out.l0.detach()]).double()
    state.step += 1
    state.window_steps += 1


def _log_row(sae: nn.Module, plan: _Plan, state: _State) -> dict[str, float] | None:
    """The means since the last row, every log_every steps and at the end; here the host waits for the device."""
    if state.step % plan.log_every and state.step < plan.steps:
        return None
    means = (state.window / state.window_steps).tolist()
    row = {"step": state.step, **dict(zip(COLUMNS, means, strict=True))}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss is {row['loss']} before step {state.step}: look at the activations, or lower lr"
        )
    row["dead_share"] = sae.dead.double().mean().item()
    row["lr"] = plan.lr * plan.factor(state.step - 1)
    state.window.zero_()
    state.window_steps = 0
    return row


def _publish(row: dict[str, float] | None, state: _State, log, bar) -> None:
    if row is None:
        return
    state.history.append(row)
    if log is not None:
        log(dict(row))
    bar.set_postfix(
        {name: f"{row[name]:.4g}" for name in ("loss", "fvu", "l0", "dead_share") if name in row}, refresh=False
    )


def _validation(sae: nn.Module, state: _State, validate: Callable[[nn.Module], float], patience: int | None) -> float:
    sae.eval()
    try:
        with torch.no_grad():
            score = float(validate(sae))
    finally:
        sae.train()
    if state.best is None or score < state.best:
        state.best, state.bad = score, 0
        if patience is not None:
            state.best_weights = copy.deepcopy(sae.state_dict())
    else:
        state.bad += 1
    return score


class _Silent:
    def update(self, n: int) -> None: ...

    def set_postfix(self, values: dict[str, str], refresh: bool) -> None: ...

    def close(self) -> None: ...


def _bar(steps: int, done: int, progress: bool) -> Any:
    if not progress:
        return _Silent()
    return need("tqdm", "the progress bar (progress=True)", "train").tqdm(
        total=steps, initial=done, desc="SAE", unit="step"
    )


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


def _save(path: Path | None, sae: nn.Module, plan: _Plan, state: _State) -> None:
    if path is None:
        return
    scheduler = {key: value for key, value in state.scheduler.state_dict().items() if key != "lr_lambdas"}
    training = {
        "plan": asdict(plan),
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": scheduler,
        "window": state.window,
        "window_steps": state.window_steps,
        "history": state.history,
        "source": state.source.state_dict(),
        "best": state.best,
        "bad": state.bad,
        "best_weights": state.best_weights,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(state.window.device) if state.window.is_cuda else None,
    }
    write_folder(path, sae, training)


def _restore(path: Path, sae: nn.Module, plan: _Plan, state: _State, device: torch.device) -> None:
    folder = find_folder(path)
    training = read_training(folder)
    now = asdict(plan)
    then = {**training["plan"], "betas": tuple(training["plan"]["betas"])}
    differing = [f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in now if then.get(name) != now[name]]
    if differing:
        raise ValueError(f"resume: this run is not the one in {folder}: {'; '.join(differing)}")
    load_weights(sae, folder)
    state.optimizer.load_state_dict(training["optimizer"])
    state.scheduler.load_state_dict({**training["scheduler"], "lr_lambdas": [None]})
    state.source.load_state_dict(training["source"])
    state.window.copy_(training["window"])
    state.step, state.window_steps = training["step"], training["window_steps"]
    state.history = training["history"]
    state.best, state.bad, state.best_weights = training["best"], training["bad"], training["best_weights"]
    torch.set_rng_state(training["rng"])
    if device.type == "cuda" and training["cuda_rng"] is not None:
        torch.cuda.set_rng_state(training["cuda_rng"], device)
