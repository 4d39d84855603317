"""What decides the numbers of a training run."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPTIONAL = ("clip", "patience", "validate_every")


@dataclass(frozen=True)
class Recipe:
    """A resumed run must agree on all of it. Numbers of any kind become Python's own, which a checkpoint can hold.

    Raises ValueError naming what is out of range.
    """

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
    compute_dtype: str | None
    source: str

    def __post_init__(self) -> None:
        self._make_plain()
        for name in ("steps", "batch_size", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        for name in ("patience", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the steps, 0 to 1, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 or None, got {self.clip}")
        if self.compute_dtype not in (None, "bfloat16", "float32", "float64"):
            raise ValueError(f"compute_dtype must be bfloat16, float32, float64 or None, got {self.compute_dtype}")

    def _make_plain(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            self._make(name, operator.index, "an int of at least 1")
        for name in ("seed", "patience", "validate_every"):
            self._make(name, operator.index, "an int")
        for name in ("lr", "warmup", "decay", "clip"):
            self._make(name, float, "a number")
        self._make("betas", lambda betas: tuple(float(beta) for beta in betas), "two numbers")

    def _make(self, name: str, kind: Callable[[Any], Any], wanted: str) -> None:
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        try:
            object.__setattr__(self, name, kind(value))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be {wanted}, got {value!r}") from None

    def factor(self, step: int) -> float:
        """The share of lr at `step`: up over the warm-up, flat, then linearly to 0 over the decay."""
        rise, fall = round(self.warmup * self.steps), round(self.decay * self.steps)
        up = min(1.0, (step + 1) / rise) if rise else 1.0
        down = min(1.0, (self.steps - step) / fall) if fall else 1.0
        return max(0.0, min(up, down))

    def differences(self, then: dict[str, object]) -> list[str]:
        """What of it was otherwise `then`, the fields of an earlier run."""
        now = {name: getattr(self, name) for name in self.__dataclass_fields__}
        then = {**then, "betas": tuple(then.get("betas", ()))}
        return [f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in now if then.get(name) != now[name]]
