"""Training loops of the reference recommenders: seeded, interruptible, with early stopping on a validation score."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ._bags import distinct, take


class Bags(Protocol):
    """Users' items as flat [nnz] and offsets [n_users + 1], int64: sae_kernels.data.histories.Histories is one."""

    flat: Tensor
    offsets: Tensor


@dataclass
class FitResult:
    """losses: mean training loss of every epoch; scores: what validate returned; best_epoch counts from 0."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    seconds: float = 0.0


def fit_collaborative(
    model: nn.Module,
    histories: Bags,
    *,
    epochs: int = 10,
    batch_size: int = 1024,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int = 3,
) -> FitResult:
    """Trains ELSA or MultVAE (any module with training_loss(flat, offsets)) with Adam on the users' whole histories,
    of which an item that stands twice counts once.

    progress: wraps the range of steps, as tqdm does (set_postfix is called where it exists). validate(model) -> score,
    higher is better, after every epoch: training stops after `patience` epochs without a new best, and the best epoch's
    weights are put back. The model ends in eval mode, also where Ctrl-C (KeyboardInterrupt, passed on) ends the run.
    The same seed gives the same weights on the same machine; torch's global random state is left as it was.
    """
    _check(model, histories, epochs, batch_size, lr)
    rows, loss = _Rows(*distinct(histories.flat, histories.offsets, model.n_items)), model.training_loss
    return _fit(model, rows, loss, epochs, batch_size, lr, betas, seed, progress, validate, patience)


def fit_sequential(
    model: nn.Module,
    sequences: Bags,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    negatives: int | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int = 3,
) -> FitResult:
    """Trains SASRec to name the next item at every position of every sequence (items in time order).

    negatives: None for the cross-entropy over all items; a number for one over the target and that many random items,
    drawn anew in every step: cheaper where the items are many. The rest as fit_collaborative. Sequences of fewer than
    two items teach nothing and are left out.
    """
    _check(model, sequences, epochs, batch_size, lr)
    if negatives is not None and negatives < 1:
        raise ValueError(f"fit_sequential: negatives must be None or at least 1, got {negatives}")
    long_enough = (sequences.offsets.diff() >= 2).nonzero().squeeze(1)
    if long_enough.numel() == 0:
        raise ValueError("fit_sequential: no sequence has two items")
    flat, offsets = take(sequences.flat, sequences.offsets, long_enough)

    def loss(batch_flat: Tensor, batch_offsets: Tensor) -> Tensor:
        return model.training_loss(batch_flat, batch_offsets, negatives)

    return _fit(model, _Rows(flat, offsets), loss, epochs, batch_size, lr, betas, seed, progress, validate, patience)


@dataclass
class _Rows:
    flat: Tensor
    offsets: Tensor


def _fit(model, histories, loss_of, epochs, batch_size, lr, betas, seed, progress, validate, patience) -> FitResult:
    start, result, best = time.perf_counter(), FitResult(), None
    device = next(model.parameters()).device
    n_users = histories.offsets.numel() - 1
    per_epoch = -(-n_users // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    steps = progress(range(epochs * per_epoch)) if progress else range(epochs * per_epoch)
    total = torch.zeros((), device=device)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for step in steps:
                place = step % per_epoch
                if place == 0:
                    model.train()
                    order = torch.randperm(n_users)
                    total.zero_()
                rows = order[place * batch_size : (place + 1) * batch_size].sort().values
                loss = loss_of(*(t.to(device) for t in take(histories.flat, histories.offsets, rows)))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
                if place < per_epoch - 1:
                    continue
                result.losses.append(float(total) / per_epoch)
                if hasattr(steps, "set_postfix"):
                    steps.set_postfix(loss=f"{result.losses[-1]:.4f}")
                if validate is not None:
                    best = _validated(model, validate, result, best)
                    if len(result.scores) - 1 - result.best_epoch >= patience:
                        break
    finally:
        if best is not None:
            model.load_state_dict(best)
        model.eval()
        result.seconds = time.perf_counter() - start
    return result


def _validated(model: nn.Module, validate: Callable, result: FitResult, best: dict | None) -> dict:
    """Notes the score of this epoch; returns a copy of the weights where it is the best so far, else the old copy."""
    model.eval()
    with torch.no_grad():
        result.scores.append(float(validate(model)))
    best_score = math.nan if result.best_epoch is None else result.scores[result.best_epoch]
    if math.isnan(best_score) or result.scores[-1] > best_score:
        result.best_epoch = len(result.scores) - 1
        return {name: value.clone() for name, value in model.state_dict().items()}
    return best


def _check(model: nn.Module, histories: Bags, epochs: int, batch_size: int, lr: float) -> None:
    if histories.offsets.numel() < 2:
        raise ValueError("fit: there are no histories to train on")
    if histories.flat.numel() and int(histories.flat.max()) >= model.n_items:
        highest = int(histories.flat.max())
        raise ValueError(f"fit: histories have item {highest} and the model knows {model.n_items} items")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"fit: {name} must be an int of at least 1, got {value!r}")
    if not lr > 0:
        raise ValueError(f"fit: lr must be positive, got {lr}")
