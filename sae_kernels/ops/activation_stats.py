"""ActivationStats: what each latent did over a stream of sparse codes, the same bits however it was split."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _checks, _stats_gpu, _stats_settings, reference_stats
from ._backend import pick

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define(
    "activation_stats_update(Tensor values, Tensor indices, Tensor(a!) counts, Tensor(b!) sums, Tensor(c!) maximum, "
    "Tensor(d!) last, Tensor(e!) rejected, int row) -> ()"
)
_lib.define("activation_stats_histogram(Tensor values, Tensor indices, Tensor(a!) table, int low, int bits) -> ()")
_lib.define(
    "activation_stats_top(Tensor values, Tensor indices, Tensor ids, Tensor(a!) top_values, Tensor(b!) top_ids) -> ()"
)
_lib.define("activation_stats_cooccurrence(Tensor values, Tensor indices, Tensor? position, Tensor(a!) table) -> ()")
KERNELS = ("update", "histogram", "top", "cooccurrence")


def _changes_in_place(*args) -> None:
    """The fake of every kernel here: nothing new is made."""


for _name in KERNELS:
    torch.library.register_fake(f"sae_kernels::activation_stats_{_name}", _changes_in_place, lib=_lib)


class ActivationStats:
    """Per-latent statistics of streamed (values, indices) batches.

    d_sae: number of latents. histogram: True, or (low, high, per_octave): bins of |value| from 2^low to 2^high,
    per_octave (a power of two) equal bins to each doubling; True is (-20, 12, 8). top: keep the n largest values of
    each latent with their ids. cooccurrence: True for all latents (8 d_sae^2 bytes), or a 1-d integer tensor of the
    latents to count among; a table of more than 4 GiB is refused. first_row: number of the first row; give shards of
    one stream their place in it. device: where the state lives.

    Results beside the properties below, int64 unless said otherwise, None where not asked for: counts and rejected
    [d_sae]; last_fired [d_sae], a row number, -1 for never; histogram [d_sae, bins + 2]; top_values [d_sae, top]
    float64, descending, -inf beyond the firings, and their top_ids, -1 there; cooccurrence [d_sae, d_sae] or [m, m] of
    cooccurrence_latents [m]: in how many rows two latents fire together.

    A firing is an entry whose value is not 0. NaN, Inf and magnitudes of 2^22 or more are counted in `rejected` and
    nowhere else. Sums are exact: each value and its square is rounded once to a multiple of 2^-64 and added as
    integers, so every split into batches, merging order and number of threads gives the same bits. A latent is
    expected once in a row; repeats count each time.

    Rows are numbered as they come, masked rows not counted: the ids that `top` keeps where none are given, and what
    `last_fired` holds. Merging takes the larger `last_fired` and `next_row`; shards that all number from 0 therefore
    keep the position within their own stream.

    On a GPU `update` does not wait for the device, so what it cannot know yet shows later: an index out of range counts
    nowhere, and the next reading of a result raises the ValueError. Replayed in a CUDA graph, an update counts again
    but numbers no new rows: `rows` stays, so give `ids`.
    """

    def __init__(
        self,
        d_sae: int,
        *,
        histogram: bool | tuple[int, int, int] = False,
        top: int = 0,
        cooccurrence: bool | Tensor = False,
        first_row: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        op = "ActivationStats"
        _checks.integer(op, "d_sae", d_sae, 1, 2**31 - 1)
        _checks.integer(op, "top", top, 0, 2**20)
        _checks.integer(op, "first_row", first_row, 0, 2**62)
        self.d_sae, self._rows, self._next_row = d_sae, 0, first_row

        def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.counts, self.rejected, self.last_fired = full(d_sae), full(d_sae), full(d_sae, value=-1)
        self._sums = full(d_sae, 2, 4)
        # what the device alone knows yet: rows of masked batches, entries whose index was out of range
        self._pending, self._masked, self._unread = full(2), False, False
        self._max = full(d_sae, value=-torch.inf, dtype=torch.float64)
        self._bins = _stats_settings.bins(histogram)
        self.histogram = None if self._bins is None else full(d_sae, self.bin_edges.shape[0] + 1)
        self.top_values = full(d_sae, top, value=-torch.inf, dtype=torch.float64) if top else None
        self.top_ids = full(d_sae, top, value=-1) if top else None
        self.cooccurrence_latents = _stats_settings.subset(cooccurrence, d_sae, self.counts.device)
        self._position = self.cooccurrence = None
        _stats_settings.check_table(d_sae if cooccurrence is True else self.cooccurrence_latents)
        if cooccurrence is True:
            self.cooccurrence = full(d_sae, d_sae)
        elif self.cooccurrence_latents is not None:
            m = self.cooccurrence_latents.shape[0]
            self._position = full(d_sae, value=-1)
            self._position[self.cooccurrence_latents] = torch.arange(m, device=self.counts.device)
            self.cooccurrence = full(m, m)

    @torch.no_grad()
    def update(self, values: Tensor, indices: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Adds a batch.

        values [..., k] floating; indices [..., k] int32 or int64 in [0, d_sae); ids [...] int32 or int64, the names
        of the rows that `top` keeps (their numbers where None); mask [...] bool, False for rows that count nowhere.
        Raises TypeError or ValueError that names the argument, before anything is changed; so does torch where memory
        runs out.
        """
        self._check(values, indices, ids, mask)
        shape, k = values.shape[:-1], values.shape[-1]
        values, indices = values.reshape(shape.numel(), k), indices.reshape(shape.numel(), k)
        on_gpu = _stats_gpu.kernels(values.device, self.d_sae)
        if on_gpu is not None:
            self._run_on_gpu(on_gpu, values, indices, ids, mask)
            return
        backend = pick(values.device)
        if mask is not None:
            keep = mask.reshape(-1)
            values, indices = values[keep], indices[keep]
            ids = None if ids is None else ids.reshape(-1)[keep]
        self._check_range(indices)
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        state = () if backend == "cpu" else (t for t in vars(self).values() if isinstance(t, Tensor))
        with reference_stats.all_or_nothing(state):
            self._run(backend, values.contiguous(), indices.contiguous(), ids)
        self._rows, self._next_row = self.rows + values.shape[0], self.next_row + values.shape[0]

    def _run(self, backend: str, values: Tensor, indices: Tensor, ids: Tensor | None) -> None:
        def kernel(name: str):
            if backend == "cpu":
                return getattr(torch.ops.sae_kernels, f"activation_stats_{name}")
            return getattr(reference_stats, name)

        kernel("update")(
            values, indices, self.counts, self._sums, self._max, self.last_fired, self.rejected, self.next_row
        )
        if self.histogram is not None:
            low, _, per_octave = self._bins
            kernel("histogram")(values, indices, self.histogram, low, per_octave.bit_length() - 1)
        if self.top_values is not None:
            if ids is None:
                ids = torch.arange(self.next_row, self.next_row + values.shape[0], device=values.device)
            kernel("top")(values, indices, ids.reshape(-1).long().contiguous(), self.top_values, self.top_ids)
        if self.cooccurrence is not None:
            kernel("cooccurrence")(values, indices, self._position, self.cooccurrence)

    def _run_on_gpu(
        self, kernels: dict[str, Callable], values: Tensor, indices: Tensor, ids: Tensor | None, mask: Tensor | None
    ) -> None:
        """Nothing here waits for the device, and no memory is asked for after the state has begun to change."""
        rows, numbers, seen = values.shape[0], None, None
        if mask is not None:
            keep = mask.reshape(-1)
            values, indices = torch.where(keep[:, None], values, 0), torch.where(keep[:, None], indices, 0)
            numbers = keep.cumsum(0) + (self._pending[0] + (self._next_row - 1))
            seen = keep.sum()
        elif self._masked:
            numbers = torch.arange(self._next_row, self._next_row + rows, device=values.device) + self._pending[0]
        values, indices = values.contiguous(), indices.contiguous()
        if self.top_values is not None:
            if ids is None:
                ids = numbers
            if ids is None:
                ids = torch.arange(self._next_row, self._next_row + rows, device=values.device)
            kernels["top"](values, indices, ids.reshape(-1).long().contiguous(), self.top_values, self.top_ids)
        state = (self.counts, self._sums, self._max, self.last_fired, self.rejected, self._pending[1:])
        kernels["update"](values, indices, *state, self._next_row, numbers)
        if self.histogram is not None:
            low, _, per_octave = self._bins
            kernels["histogram"](values, indices, self.histogram, low, per_octave.bit_length() - 1)
        if self.cooccurrence is not None:
            kernels["cooccurrence"](values, indices, self._position, self.cooccurrence)
        self._unread = True
        if seen is None:
            self._rows, self._next_row = self._rows + rows, self._next_row + rows
        else:
            self._masked = True
            self._pending[:1] += seen

    def _read(self) -> None:
        """Waits for the device, where it knows more: rows of masked batches, indices that were out of range."""
        if not self._unread:
            return
        rows, foreign = self._pending.tolist()
        self._pending.zero_()
        self._masked = self._unread = False
        self._rows, self._next_row = self._rows + rows, self._next_row + rows
        if foreign:
            raise ValueError(
                f"ActivationStats.update: indices must be in [0, d_sae = {self.d_sae}); {foreign} entries of the "
                "batches so far were not, and count nowhere"
            )

    @property
    def rows(self) -> int:
        """Rows seen, without masked ones."""
        self._read()
        return self._rows

    @property
    def next_row(self) -> int:
        """Number of the next row."""
        self._read()
        return self._next_row

    def _check(self, values: Tensor, indices: Tensor, ids: Tensor | None, mask: Tensor | None) -> None:
        op = "ActivationStats.update"
        _checks.tensor(op, "values", values)
        _checks.tensor(op, "indices", indices)
        _checks.floating(op, values=values)
        if values.dim() == 0 or values.shape != indices.shape:
            shapes = f"values {tuple(values.shape)} and indices {tuple(indices.shape)}"
            raise ValueError(f"{op}: {shapes} must both be [..., k]")
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: indices must be int32 or int64, got {indices.dtype}")
        _checks.same_device(op, "the state", self.counts, "values", values)
        _checks.same_device(op, "values", values, "indices", indices)
        for name, t, dtypes in (("ids", ids, (torch.int32, torch.int64)), ("mask", mask, (torch.bool,))):
            if t is None:
                continue
            _checks.tensor(op, name, t)
            if t.dtype not in dtypes:
                raise TypeError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {t.dtype}")
            if t.shape != values.shape[:-1]:
                rows = tuple(values.shape[:-1])
                raise ValueError(f"{op}: {name} must have one entry per row, {rows}, got {tuple(t.shape)}")
            _checks.same_device(op, "values", values, name, t)

    def _check_range(self, indices: Tensor) -> None:
        if indices.numel() == 0:
            return
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= self.d_sae:
            raise ValueError(
                f"ActivationStats.update: indices must be in [0, d_sae = {self.d_sae}), got values from {low} to {high}"
            )

    @property
    def sum(self) -> Tensor:
        """[d_sae] float64: sum of the values, exact to 2^-65 per entry before this last rounding."""
        self._read()
        return reference_stats.to_float(self._sums[:, 0])

    @property
    def sum_sq(self) -> Tensor:
        """[d_sae] float64: sum of the squared values."""
        self._read()
        return reference_stats.to_float(self._sums[:, 1])

    @property
    def mean(self) -> Tensor:
        """[d_sae] float64: mean over the firings; 0 where there is none."""
        return self.sum / self.counts.clamp(min=1)

    @property
    def max(self) -> Tensor:
        """[d_sae] float64: largest value among the firings; 0 where there is none."""
        self._read()
        return torch.where(self.counts > 0, self._max, 0.0)

    @property
    def density(self) -> Tensor:
        """[d_sae] float64: share of the rows in which the latent fired."""
        return self.counts.double() / max(self.rows, 1)

    @property
    def dead_share(self) -> float:
        """Share of all d_sae latents that never fired."""
        self._read()
        return float((self.counts == 0).double().mean())

    @property
    def bin_edges(self) -> Tensor:
        """[bins + 1] float64: edges of the histogram; its first and last columns count what lies outside them."""
        if self._bins is None:
            raise ValueError("ActivationStats was made with histogram=False, so it has no bins")
        low, high, per_octave = self._bins
        steps = torch.arange((high - low) * per_octave + 1, dtype=torch.float64)
        octave = (steps / per_octave).floor()
        return torch.ldexp(1 + (steps - octave * per_octave) / per_octave, octave + low)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of |value| over the firings, from the histogram.

        q: float or tensor, in [0, 1] -> [*q.shape, d_sae] float64; 0 where the latent never fired. The right bin is
        always hit, so the error is at most 1 / per_octave of the value, inside the range of the histogram; beyond it
        the nearest end is given (0 to 2^low below). Raises ValueError without a histogram or for q outside [0, 1].
        """
        self._read()
        device = self.counts.device
        edges = self.bin_edges.to(device)
        q = torch.as_tensor(q, dtype=torch.float64, device=device)
        if q.isnan().any() or (q < 0).any() or (q > 1).any():
            raise ValueError(f"quantile: q must be in [0, 1], got {q.tolist()}")
        seen = self.histogram.cumsum(1)
        rank = q.reshape(-1, 1) * (seen[:, -1] - 1).clamp(min=0)
        place = torch.searchsorted(seen, rank.floor().long().T.contiguous(), right=True).clamp(max=seen.shape[1] - 1)
        inside = self.histogram.gather(1, place)
        before = seen.gather(1, place) - inside
        lower = torch.cat([edges.new_zeros(1), edges])[place]
        upper = torch.cat([edges, edges[-1:]])[place]
        share = ((rank.T - before + 0.5) / inside.clamp(min=1)).clamp(0, 1)
        value = torch.where(seen[:, -1:] > 0, lower + (upper - lower) * share, 0.0)
        return value.T.reshape(*q.shape, self.d_sae)

    def to(self, device: torch.device | str) -> "ActivationStats":
        """Moves the state to another device, in place; returns self."""
        for name, t in vars(self).items():
            if isinstance(t, Tensor):
                setattr(self, name, t.to(device))
        return self

    def merge(self, other: "ActivationStats") -> "ActivationStats":
        """Adds what another one of the same settings has seen; returns self. ValueError where the settings differ."""
        if not isinstance(other, ActivationStats):
            raise TypeError(f"merge: other must be ActivationStats, got {type(other).__name__}")
        if other is self:
            raise ValueError("merge: other is this very object, which would count everything twice")
        self._check_same(other.state_dict(), "merge: other")
        for name in ("counts", "rejected", "_sums", "histogram", "cooccurrence"):
            if getattr(self, name) is not None:
                getattr(self, name).add_(getattr(other, name).to(self.counts.device))
        reference_stats.carry(self._sums)
        for name in ("last_fired", "_max"):
            mine = getattr(self, name)
            torch.maximum(mine, getattr(other, name).to(mine.device), out=mine)
        if self.top_values is not None:
            self._merge_top(other.top_values.to(self.counts.device), other.top_ids.to(self.counts.device))
        self._rows, self._next_row = self.rows + other.rows, max(self.next_row, other.next_row)
        return self

    def _merge_top(self, values: Tensor, ids: Tensor) -> None:
        n = values.shape[1]
        values, ids = torch.cat([self.top_values, values], 1), torch.cat([self.top_ids, ids], 1)
        order = ids.argsort(dim=1, stable=True)
        order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :n]
        self.top_values, self.top_ids = values.gather(1, order), ids.gather(1, order)

    def all_reduce(self) -> "ActivationStats":
        """Leaves the merge of all in every process of torch.distributed; does nothing where that is not initialised.

        Once, at the end: a second call would count the shares of the others again. Returns self.
        """
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        top = None if self.top_values is None else (self.top_values.contiguous(), self.top_ids.contiguous())
        rows = torch.tensor([self.rows], device=self.counts.device)
        for t in (self.counts, self.rejected, self._sums, self.histogram, self.cooccurrence, rows):
            if t is not None:
                dist.all_reduce(t)
        reference_stats.carry(self._sums)
        next_row = torch.tensor([self.next_row], device=self.counts.device)
        for t in (self.last_fired, self._max, next_row):
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        self._rows, self._next_row = int(rows), int(next_row)
        if top is not None:
            gathered = [[torch.empty_like(t) for _ in range(dist.get_world_size())] for t in top]
            for t, parts in zip(top, gathered, strict=True):
                dist.all_gather(parts, t)
            self.top_values, self.top_ids = gathered[0][0], gathered[1][0]
            for values, ids in zip(gathered[0][1:], gathered[1][1:], strict=True):
                self._merge_top(values, ids)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors; those of the state itself, not copies."""
        state = {
            "rows": torch.tensor([self.rows, self.next_row]),
            "bins": torch.tensor(self._bins or (), dtype=torch.int64),
            "counts": self.counts,
            "sums": self._sums,
            "max": self._max,
            "last_fired": self.last_fired,
            "rejected": self.rejected,
        }
        for name in ("histogram", "top_values", "top_ids", "cooccurrence", "cooccurrence_latents"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a state saved with the same settings; ValueError names what does not fit, changing nothing."""
        self._check_same(state, "load_state_dict: state")
        self._read()
        self._rows, self._next_row = (int(x) for x in state["rows"])
        for name, mine in self.state_dict().items():
            if name not in ("rows", "bins"):
                mine.copy_(state[name])

    def _check_same(self, state: dict[str, Tensor], what: str) -> None:
        mine = self.state_dict()
        missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or unexpected:
            raise ValueError(f"{what} does not fit: missing keys {missing}, unexpected keys {unexpected}")
        for name, t in mine.items():
            if t.shape != state[name].shape or t.dtype != state[name].dtype:
                came = f"{state[name].dtype} {tuple(state[name].shape)}"
                raise ValueError(f"{what}: {name} must be {t.dtype} {tuple(t.shape)}, got {came}")
            if name in ("bins", "cooccurrence_latents") and not torch.equal(t.cpu(), state[name].cpu()):
                raise ValueError(f"{what}: {name} must be {t.tolist()}, got {state[name].tolist()}")
