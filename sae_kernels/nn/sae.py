"""TopKSAE: a sparse autoencoder that keeps the k strongest latents of every row."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import _autocast, _checks, sparse_decode, topk_encode
from ..ops.fired import fired
from ..ops.reference import accumulator
from ..ops.refit_values import refit_values
from ..ops.sae_loss import autoencoder_loss, has_autoencoder_loss
from ..ops.topk_encode import ACTIVATIONS
from .code import SparseCode
from .constrain import ConstraintHandle, normalize_rows_, project_rows_
from .group import summed
from .loss import (
    SAELoss,
    auxk_loss,
    checked_weight,
    keeps_residual,
    reconstruction_error,
    total_variance,
    weighted_sum,
)
from .normalize import Normalizer, geometric_median
from .refit import refitted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TopKSAE(nn.Module):
    """x_hat = decode(topk(activation(W_enc (norm(x) - b_dec) + b_enc))), undone by the same norm.

    W_enc, W_dec [d_sae, d_in], a row per latent; b_enc [d_sae]; b_dec [d_in]. Rows of W_dec start with unit norm; call
    `constrain(optimizer)` once to keep them so. tied_init: W_enc starts as a copy of W_dec, else independent Kaiming.
    activation: "relu", "none" or "abs". normalize: see Normalizer; "global" needs `fit_normalizer(x)` first.

    A latent is dead after `dead_after` rows of training without firing (default: a hundred times d_sae / k, the rows in
    which one of average use fires once, and 10,000 at least). AuxK, weighed by aux_coef (0 switches it off), lets up to
    k_aux dead latents per row reconstruct it (default: half of d_in, at most 512), among the quarter of the width that
    has been silent longest, on the first aux_rows rows of the batch: its cost is bounded whatever the batch.

    refit: steps by which `encode` moves the values of the latents it has chosen towards the least-squares fit of x:
    inference-time optimisation (Smith 2024), of values alone. The encoder reads each latent by itself and misjudges
    those that overlap; 4 steps come close to the fit, 0 leaves the encoder's values. `loss` does not use it, so that it
    can be set on a trained SAE: `sae.refit = 4`. Gradients pass through refitted values as through the encoder's.

    x of any leading dimensions and any floating dtype; it is computed in the parameters' dtype and returned in its own.
    Raises TypeError or ValueError naming the argument.
    """

    variant = "topk"
    options = ("d_in", "d_sae", "k", "activation", "normalize", "k_aux", "aux_coef", "aux_rows", "dead_after", "refit")
    """Arguments of the constructor that a checkpoint keeps."""

    _affine_code = True
    """Whether values are W_enc (x - b_dec) + b_enc at the chosen latents: a step then orders the code once."""

    data_group: ProcessGroup | None = None
    """The processes that share a batch, row i being with process i mod their number; set while they train together."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        activation: str = "relu",
        normalize: str = "none",
        tied_init: bool = True,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        aux_rows: int = 2048,
        dead_after: int | None = None,
        refit: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _check_sizes(op, d_in, d_sae, k, k_aux, aux_rows, dead_after, refit)
        if activation not in ACTIVATIONS:
            raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not aux_coef >= 0:
            raise ValueError(f"{op}: aux_coef must be at least 0, got {aux_coef}")
        self.d_in, self.d_sae, self.k, self.activation = d_in, d_sae, k, activation
        self.k_aux = min(512, max(1, d_in // 2), d_sae) if k_aux is None else k_aux
        self.aux_coef, self.aux_rows, self.refit = float(aux_coef), aux_rows, refit
        self.dead_after = max(10_000, 100 * d_sae // k) if dead_after is None else dead_after
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype))
        _checks.floating(op, dtype=self.W_dec)
        self.normalizer = Normalizer(normalize, d_in, device=device, dtype=dtype)
        self.register_buffer("rows_since_fired", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self._init_weights(tied_init, generator)

    @torch.no_grad()
    def _init_weights(self, tied: bool, generator: torch.Generator | None) -> None:
        self.W_dec.normal_(generator=generator)
        normalize_rows_(self.W_dec)
        if tied:
            self.W_enc.copy_(self.W_dec)
        else:
            nn.init.kaiming_uniform_(self.W_enc, a=5**0.5, generator=generator)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}, activation={self.activation!r}"

    @property
    def normalize(self) -> str:
        """The name of the input normaliser."""
        return self.normalizer.name

    @property
    def dead(self) -> Tensor:
        """[d_sae] bool: the latents that have not fired for more than dead_after rows of training."""
        return self.rows_since_fired > self.dead_after

    def fit_normalizer(self, x: Tensor) -> None:
        """Sets the "global" normaliser's mean and scale from x [..., d_in]; ValueError for any other normaliser."""
        self._check_input(x)
        self.normalizer.fit(x)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor, method: str = "mean") -> None:
        """Sets b_dec to the "mean" or the "geometric_median" of the normalised x [..., d_in].

        Without it the latents that point to the mean of the rows fire on all of them, and others never.
        """
        self._check_input(x)
        if method not in ("mean", "geometric_median"):
            raise ValueError(f"init_b_dec: method must be mean or geometric_median, got {method!r}")
        rows = self.normalizer(x.reshape(-1, self.d_in))[0].double()
        if rows.shape[0] == 0:
            raise ValueError(f"init_b_dec: x {tuple(x.shape)} has no rows")
        self.b_dec.copy_(rows.mean(0) if method == "mean" else geometric_median(rows))

    def encode(self, x: Tensor) -> SparseCode:
        """x [..., d_in] -> the code of its k strongest latents, values in x's dtype, strongest first."""
        self._check_input(x)
        normalized, offset, scale = self.normalizer(x)
        normalized = normalized.to(self.W_enc.dtype)
        values, indices = self._fitted(normalized, *self._choose(normalized))
        return SparseCode(values.to(x.dtype), indices, self.d_sae, offset, scale)

    def decode(self, code: SparseCode) -> Tensor:
        """The code, edited or not -> x_hat [..., d_in] in the space of x and the dtype of code.values."""
        self._check_code(code)
        y = self._decoded(code.values.to(self.W_dec.dtype), code.indices, self.b_dec)
        if code.scale is not None:
            y = y.to(code.scale.dtype) * code.scale
        return (y if code.offset is None else y + code.offset).to(code.values.dtype)

    def decode_difference(self, edited: SparseCode, code: SparseCode) -> Tensor:
        """decode(edited) - decode(code) [..., d_in], without the rounding of what they share.

        Where `edited` keeps code.indices and code.scale, rows whose values are untouched come out as exactly 0.
        """
        self._check_code(edited)
        self._check_code(code)
        if edited.scale is not code.scale:
            return self.decode(edited) - self.decode(code)
        dtype = self.W_dec.dtype
        if edited.indices is code.indices:
            values, indices = edited.values.to(dtype) - code.values.to(dtype), code.indices
        else:
            values = torch.cat([edited.values.to(dtype), -code.values.to(dtype)], dim=-1)
            indices = torch.cat([edited.indices, code.indices.to(edited.indices.dtype)], dim=-1)
        y = self._decoded(values, indices, None)
        y = y if code.scale is None else y.to(code.scale.dtype) * code.scale
        if edited.offset is not code.offset:
            y = y + (0 if edited.offset is None else edited.offset) - (0 if code.offset is None else code.offset)
        return y.to(code.values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> x_hat, of x's shape and dtype."""
        return self.decode(self.encode(x))

    def prepare(self, x: Tensor) -> None:
        """What has to be done to the weights themselves before loss(x)."""

    def loss(self, x: Tensor, weight: Tensor | None = None) -> SAELoss:
        """The training loss of x [..., d_in], in the space in which x was normalised.

        fvu is the ratio of sums: squared error over the batch's variance about its mean, so that the learning rate does
        not depend on the scale of x. weight [...], bool (a mask) or floating and not negative, weighs the rows; rows of
        weight 0 count nowhere, whatever they hold. In training mode `rows_since_fired` is brought up to date. No host
        sync on a GPU.

        With a `data_group`, x is this process's part of the batch, and loss, fvu, aux and l0 are its shares of the
        whole batch's: they add up over the group, and so do their gradients.
        """
        self._check_input(x)
        shape, rows = x.shape[:-1], x.reshape(-1, self.d_in)
        if weight is not None:
            weight = checked_weight(f"{type(self).__name__}.loss", weight, x).reshape(-1)
            rows = torch.where((weight > 0).unsqueeze(-1), rows, 0)
        normalized, offset, scale = self.normalizer(rows)
        normalized = normalized.to(self.W_enc.dtype)
        scale_of_error = total_variance(normalized, weight, self.data_group)
        values, indices, fires, fvu = self._compare(normalized, weight, scale_of_error)
        if self.training:
            self._count_firings(values, indices, weight)
        aux = self._aux(normalized, weight) if self.aux_coef else torch.zeros_like(fvu)
        mass = summed(fires.new_zeros(()) + fires.shape[0] if weight is None else weight.sum(), self.data_group)
        l0 = (fires if weight is None else fires * weight).sum() / torch.where(mass > 0, mass, 1)
        code = SparseCode(
            values.to(x.dtype).reshape(*shape, values.shape[-1]),
            indices.reshape(*shape, values.shape[-1]),
            self.d_sae,
            offset if offset is None or offset.dim() == 1 else offset.reshape(*shape, 1),
            scale if scale is None or scale.dim() == 1 else scale.reshape(*shape, 1),
        )
        return SAELoss(self._total(fvu, aux, l0), fvu, aux, l0.detach(), code)

    def constrain(self, optimizer: torch.optim.Optimizer) -> ConstraintHandle:
        """Keeps the decoder rows at unit norm: before every optimizer.step() the gradient of W_dec is made orthogonal
        to the rows, and after it they are renormalised. Returns a handle; handle.remove() undoes it.

        Raises ValueError where W_dec is not among the optimiser's parameters.
        """
        return ConstraintHandle(self, optimizer)

    def project_grad_(self) -> None:
        """Takes out of W_dec.grad what lies along the rows of W_dec."""
        if self.W_dec.grad is not None:
            project_rows_(self.W_dec.grad, self.W_dec.detach())

    def normalize_decoder_(self) -> None:
        """Divides the rows of W_dec by their norm; rows of zeros stay."""
        normalize_rows_(self.W_dec.detach())

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, b_enc = self._encoder_input(x)
        return topk_encode(x, self.W_enc, b_enc, self.k, activation=self.activation)

    def _fitted(self, x: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        if not self.refit:
            return values, indices
        return refitted(x - self.b_dec, values, indices, self._fit_values, self.activation)

    def _fit_values(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return refit_values(x, values, indices, self.W_dec, self.refit)

    def _choose_to_train(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Values, indices [N, width], and how many latents fire per row [N], of which a penalty may want gradients."""
        values, indices = self._choose(x)
        return values, indices, self._firing_per_row(values)

    def _total(self, fvu: Tensor, aux: Tensor, l0: Tensor) -> Tensor:
        return fvu + self.aux_coef * aux

    def _compare(self, x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values and indices [N, width], how many latents fire per row [N], and the squared error over `scale`."""
        at_once = self._affine_code and _trains_on(x) and keeps_residual(x, self.W_dec)
        if not (at_once and has_autoencoder_loss(x.device)):
            values, indices, fires = self._choose_to_train(x, weight)
            return values, indices, fires, self._reconstruction_error(values, indices, x, weight, scale)
        with torch.no_grad():
            centred = None if _splits(x) else x - self.b_dec
            seen, b_enc = (x, self._centred_bias()) if centred is None else (centred, self.b_enc)
            values, indices = topk_encode(seen, self.W_enc, b_enc, self.k, activation=self.activation)
        options = {"centred": centred, "relu": self.activation == "relu"}
        parameters = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        error, values = autoencoder_loss(x, values, indices, *parameters, **options)
        return values, indices, self._firing_per_row(values), weighted_sum(error.errors, weight) / scale

    def _encoder_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and bias such that x W_enc^T + bias are the pre-activations."""
        if self.b_dec.requires_grad and _trains_on(x) and _splits(x):
            # b_dec through the bias: no copy of x, and its gradient without a gradient of the size of x
            return x, self._centred_bias()
        return x - self.b_dec, self.b_enc

    def _centred_bias(self) -> Tensor:
        with _autocast.switched_off(self.b_dec.device):
            return self.b_enc - torch.mv(self.W_enc, self.b_dec)

    def _decoded(self, values: Tensor, indices: Tensor, b_dec: Tensor | None) -> Tensor:
        return sparse_decode(values, indices, self.W_dec, b_dec)

    def _firing_per_row(self, values: Tensor) -> Tensor:
        return (values != 0).sum(-1, dtype=torch.float32)

    def _reconstruction_error(
        self, values: Tensor, indices: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor
    ) -> Tensor:
        return reconstruction_error(values, indices, self.W_dec, self.b_dec, x, weight, scale)

    @torch.no_grad()
    def _count_firings(self, values: Tensor, indices: Tensor, weight: Tensor | None) -> None:
        found = fired(values, indices, self.rows_since_fired.shape[0], weight)
        seen = values.shape[0] if weight is None else (weight > 0).sum()
        if self.data_group is not None:
            counts = torch.cat([found.int(), torch.zeros_like(found[:1], dtype=torch.int32) + seen])
            counts = summed(counts, self.data_group)
            found, seen = counts[:-1] > 0, counts[-1]
        self.rows_since_fired.add_(seen)
        self.rows_since_fired.masked_fill_(found, 0)

    def _aux(self, x: Tensor, weight: Tensor | None) -> Tensor:
        dead = self.dead
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(dead.any()):
            return x.new_zeros((), dtype=accumulator(x.dtype))  # a look at a CPU tensor is no sync
        m = min(self.d_sae, max(self.k_aux, self.d_sae // 4))
        candidates = self.rows_since_fired.topk(m).indices
        few = slice(0, self._aux_rows_here())
        return auxk_loss(
            x[few].detach() - self.b_dec.detach(),
            self.W_enc,
            self.b_enc,
            self.W_dec,
            candidates,
            dead[candidates],
            self.k_aux,
            self.activation,
            None if weight is None else weight[few],
            self.data_group,
        )

    def _aux_rows_here(self) -> int:
        if self.data_group is None:
            return self.aux_rows
        size, rank = torch.distributed.get_world_size(self.data_group), torch.distributed.get_rank(self.data_group)
        return max(0, -((rank - self.aux_rows) // size))

    def _check_input(self, x: Tensor) -> None:
        op = type(self).__name__
        _checks.tensor(op, "x", x)
        if x.dtype not in _checks.FLOATS:
            raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"{op}: x {tuple(x.shape)} must end in d_in = {self.d_in} of W_enc {tuple(self.W_enc.shape)}"
            )
        _checks.same_device(op, "W_enc", self.W_enc, "x", x)

    def _check_code(self, code: SparseCode) -> None:
        op = type(self).__name__
        if not isinstance(code, SparseCode):
            raise TypeError(f"{op}: code must be a SparseCode, got {type(code).__name__}")
        if code.d_sae != self.d_sae:
            raise ValueError(f"{op}: code has d_sae = {code.d_sae}, this SAE has {self.d_sae}")

    def get_extra_state(self) -> Tensor:
        """What the tensors do not tell, as JSON in a uint8 tensor: formats that hold tensors alone can keep it."""
        text = json.dumps({**self._conventions(), **self._progress()}, sort_keys=True)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self._restore(self._checked_state(state))

    def _progress(self) -> dict[str, bool]:
        return {"fitted": self.normalizer.fitted}

    def _restore(self, found: dict[str, str | int | float | bool]) -> None:
        self.normalizer.fitted = found["fitted"]

    def _conventions(self) -> dict[str, str | int | float]:
        return {"k": self.k, "activation": self.activation, "normalize": self.normalize}

    def _checked_state(self, state: Tensor) -> dict[str, str | int | float | bool]:
        found = json.loads(bytes(state.tolist()))
        here = self._conventions()
        differs = [f"{key}={found.get(key)!r} (here {here[key]!r})" for key in here if found.get(key) != here[key]]
        if differs:
            raise ValueError(f"the checkpoint is of another SAE: {', '.join(differs)}")
        return found

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # before the first tensor is copied: a checkpoint that does not fit must not be half loaded
        if f"{prefix}_extra_state" in state_dict:
            self._checked_state(state_dict[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _trains_on(x: Tensor) -> bool:
    """Whether x is data of a training step."""
    return torch.is_grad_enabled() and not x.requires_grad


def _splits(x: Tensor) -> bool:
    """Whether (x - b_dec) W_enc^T may be computed as two products: in 16 bits the second would be rounded."""
    return x.dtype in (torch.float32, torch.float64)


def _check_sizes(
    op: str, d_in: int, d_sae: int, k: int, k_aux: int | None, aux_rows: int, dead_after: int | None, refit: int
) -> None:
    large = 2**31 - 1
    _checks.integer(op, "d_in", d_in, 1, large)
    _checks.integer(op, "d_sae", d_sae, 1, large)
    _checks.integer(op, "k", k, 1, d_sae)
    if k_aux is not None:
        _checks.integer(op, "k_aux", k_aux, 1, d_sae)
    _checks.integer(op, "aux_rows", aux_rows, 1, large)
    if dead_after is not None:
        _checks.integer(op, "dead_after", dead_after, 0, 2**62)
    _checks.integer(op, "refit", refit, 0, large)
