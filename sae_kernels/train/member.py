"""One SAE in training: its optimiser and schedule, its means since the last row, its history and its best weights."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.group import summed
from .ranks import Ranks, clip_gradients
from .recipe import Recipe

COLUMNS = ("loss", "fvu", "aux", "l0")


class _Objective(nn.Module):
    """batch -> (loss, [4] float64 of COLUMNS).

    With a dtype it is computed on copies of the weights in it; the gradients come back to the weights as they are kept.
    """

    def __init__(self, sae: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.sae, self.dtype = sae, dtype

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if self.dtype is None:
            out = self.sae.loss(batch)
        else:
            self.sae.prepare(batch)
            weights = {f"sae.{name}": p.to(self.dtype) for name, p in self.sae.named_parameters()}
            out = torch.func.functional_call(_Loss(self.sae), weights, (batch,))
        return out.loss, torch.stack([out.loss, out.fvu, out.aux, out.l0]).detach().double()


class _Loss(nn.Module):
    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, batch: Tensor) -> Any:
        return self.sae.loss(batch)


class Member:
    """step() trains on a batch; row() gives the means since the last one; validated() keeps the best weights.

    Use as a context manager: inside it the decoder rows are constrained and the SAE knows with whom it trains.
    """

    def __init__(self, sae: nn.Module, recipe: Recipe, ranks: Ranks, device: torch.device, name: str = "") -> None:
        self.sae, self.recipe, self.ranks, self.name = sae.to(device).train(), recipe, ranks, name
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=recipe.lr, betas=recipe.betas)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.factor)
        self.window, self.window_steps = torch.zeros(len(COLUMNS), dtype=torch.float64, device=device), 0
        self.history: list[dict[str, float]] = []
        self.steps, self.bad = 0, 0
        self.best: float | None = None
        self.best_weights: dict[str, Any] | None = None
        dtype = None if recipe.compute_dtype is None else getattr(torch, recipe.compute_dtype)
        self.objective: nn.Module = _Objective(self.sae, dtype)
        if ranks.data is not None:
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, process_group=ranks.data, gradient_as_bucket_view=True
            )
            # the first one's buffers at the start; from then on they are kept equal as they change
            self.objective.broadcast_buffers = False
            state = [sae.get_extra_state()]  # what is no tensor of it
            torch.distributed.broadcast_object_list(state, group=ranks.data, group_src=0)
            sae.set_extra_state(state[0])

    def __enter__(self) -> "Member":
        self.sae.data_group, self._handle = self.ranks.data, self.sae.constrain(self.optimizer)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()
        self.sae.data_group = None

    @property
    def stopped(self) -> bool:
        return self.recipe.patience is not None and self.bad >= self.recipe.patience

    def step(self, batch: Tensor) -> None:
        loss, columns = self.objective(batch.to(self.window.device, self.sae.W_dec.dtype, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        # each process has a share of the loss, and what averages the gradients is to add them up
        (loss * self.ranks.part[1]).backward()
        if self.recipe.clip is not None:
            clip_gradients(self.sae, self.recipe.clip, self.ranks)
        self.optimizer.step()
        self.scheduler.step()
        self.window += columns  # kept on the device: reading it is what would make the host wait
        self.steps += 1
        self.window_steps += 1

    def row(self) -> dict[str, float]:
        """The means since the last row; here the host waits for the device, and every process for the others."""
        means = (summed(self.window, self.ranks.data) / self.window_steps).tolist()
        row = {"step": self.steps, **dict(zip(COLUMNS, means, strict=True))}
        if not math.isfinite(row["loss"]):
            raise self._diverged(f"the loss is {row['loss']} before step {self.steps}")
        dead = summed(self.sae.dead.double().sum(), self.ranks.shard)
        row["dead_share"] = (dead / self.sae.d_sae).item()
        row["lr"] = self.recipe.lr * self.recipe.factor(self.steps - 1)
        self.window.zero_()
        self.window_steps = 0
        return row

    def check_finite(self) -> None:
        """Raises FloatingPointError, on all processes, where the loss since the last row or the weights that training
        goes on with, or ends with, are not finite."""
        ended = self.stopped and self.best_weights is not None
        weights = self.best_weights if ended else self.sae.state_dict()
        kept = [*weights.values(), *([] if ended else [self.window[0]])]
        wrong = not all(bool(t.isfinite().all()) for t in kept if t.is_floating_point())
        if self.ranks.any(wrong, self.window.device):
            raise self._diverged(f"the loss or the weights are not finite after step {self.steps}")

    def _diverged(self, how: str) -> FloatingPointError:
        of = f"{self.name}: " if self.name else ""
        return FloatingPointError(f"{of}{how}: look at the activations, or lower lr")

    def validated(self, validate: Callable[[nn.Module], float]) -> float:
        # each process validates on the whole: what shares a batch out must not take its loss for a share
        self.sae.data_group = None
        self.sae.eval()
        try:
            with torch.no_grad():
                score = self.ranks.shared(float(validate(self.sae)))
        finally:
            self.sae.train()
            self.sae.data_group = self.ranks.data
        if not math.isnan(score) and (self.best is None or score < self.best):
            self.best, self.bad = score, 0
            if self.recipe.patience is not None:
                self.best_weights = copy.deepcopy(self.sae.state_dict())
        else:
            self.bad += 1
        return score

    def put_best_back(self) -> None:
        if self.best_weights is not None:
            self.sae.load_state_dict(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and tensors of a fixed size, that the next step depends on beside the weights and `tensors()`."""
        return {
            "recipe": asdict(self.recipe),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"},
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "window": summed(self.window, self.ranks.data),
            "window_steps": self.window_steps,
            "history": self.history,
            "steps": self.steps,
            "best": self.best,
            "bad": self.bad,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Adam's state and the best weights: adam.<parameter>.<field> and best.<key>, as far as they are there."""
        found = {
            f"adam.{name}.{field}": value
            for name, p in self.sae.named_parameters()
            for field, value in self.optimizer.state.get(p, {}).items()
        }
        return found | {f"best.{key}": value for key, value in (self.best_weights or {}).items()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        names = [name for name, _ in self.sae.named_parameters()]
        adam: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, name, field = key.split(".")
                adam.setdefault(names.index(name), {})[field] = value
        self.optimizer.load_state_dict({"state": adam, "param_groups": state["param_groups"]})
        self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
        # the sum over the processes was kept: the first one carries it on
        self.window.copy_(state["window"] if self.ranks.first_copy else torch.zeros_like(state["window"]))
        self.window_steps, self.history, self.steps = state["window_steps"], state["history"], state["steps"]
        self.best, self.bad = state["best"], state["bad"]
        best = {key.removeprefix("best."): value for key, value in tensors.items() if key.startswith("best.")}
        self.best_weights = best or None
