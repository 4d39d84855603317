"""Edits of sparse codes: functions SparseCode -> SparseCode, for `attach(..., edit=...)`; nothing is ever d_sae wide.

latents: an int, a sequence of ints or a 1-d integer tensor, distinct, each in [0, d_sae). Every edit works on the whole
activation of a latent, also where it stands in several slots of a row or in none, and leaves all other latents alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..nn.code import SparseCode
from ..ops.sparse_decode import sparse_decode

Edit = Callable[[SparseCode], SparseCode]
Latents = int | Sequence[int] | Tensor
SHARPNESS = 1.0  # of a row's taste within a concept; the best of 1/4 to 4 on 700 users of goodbooks10k, ELSA, seed 0


def mix(latents: Latents, alpha: float, weights: Tensor | Sequence[float] | None = None) -> Edit:
    """z -> (1 - alpha) z + alpha s w / sum(w) on the m latents, s = sum of the row's |values|.

    Of values that are not negative the mass s stays. Of others, as activations "abs" and "none" give them, what comes
    in is positive all the same: it is towards the latents. alpha in [0, 1] (Spisak et al. 2026, where w is 1). weights
    [m], not negative: what each latent is worth, all alike where None. A row that fires nowhere stays so.
    """
    if weights is None:
        return mix_all([(latents, alpha)])
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != (torch.as_tensor(latents).numel(),):
        count = torch.as_tensor(latents).numel()
        raise ValueError(f"mix: weights must be one per latent, ({count},), got {tuple(weights.shape)}")
    if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
        raise ValueError("mix: weights must be finite, not negative, and not all 0")
    return _mixed([_latents("mix", latents)], [alpha], [weights / weights.sum()])


def mix_all(parts: Sequence[tuple[Latents, float]]) -> Edit:
    """Several concepts at once: z -> (1 - sum of the alphas) z + alpha_c s / m_c on the m_c latents of each part.

    s as in mix. parts: (latents, alpha), the alphas in [0, 1] with a sum of at most 1; a latent may stand in several
    of them.
    """
    chosen = [_latents("mix", latents) for latents, _ in parts]
    each = [torch.full((part.numel(),), 1 / max(part.numel(), 1), dtype=torch.float64) for part in chosen]
    return _mixed(chosen, [alpha for _, alpha in parts], each)


def _mixed(chosen: list[Tensor], alphas: list[float], weights: list[Tensor]) -> Edit:
    """weights: of each part, summing to 1."""
    if not chosen or any(part.numel() == 0 for part in chosen):
        raise ValueError("mix: latents must name at least one latent")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"mix: alpha must be between 0 and 1, got {alpha}")
    # three times 1/3 may come out above 1
    if sum(alphas) > 1 + 1e-9:
        raise ValueError(f"mix: the alphas must sum to at most 1, got {sum(alphas)}")
    where, rest = torch.cat(chosen), max(1 - sum(alphas), 0.0)
    share = torch.cat([part * alpha for part, alpha in zip(weights, alphas, strict=True)])

    def edit(code: SparseCode) -> SparseCode:
        mass = _mass(code)
        return _with_slots(code, code.values * rest, where, mass * share.to(mass))

    return edit


def mix_near(latents: Latents, alpha: float, W_dec: Tensor, weights: Tensor | Sequence[float] | None = None) -> Edit:
    """mix with weights of each row's own: w_f times how near latent f is to what the row's code decodes to.

    Near: the positive part of <W_dec[f], sum_g z_g W_dec[g]>. Of a concept's latents a user gets those of the kind that
    they like, so that many latents (some hundred) can be given. A row near to none gets the weights alone. W_dec
    [d_sae, d]: the SAE's; the rest as mix.
    """

    def target(code: SparseCode, W: Tensor) -> Tensor:
        return sparse_decode(code.values, code.indices, W, None)

    return _mixed_by_row("mix_near", latents, alpha, W_dec, weights, target)


def mix_liked(
    latents: Latents,
    alpha: float,
    sae: nn.Module,
    items: Tensor,
    weights: Tensor | Sequence[float] | None = None,
    *,
    sharpness: float = SHARPNESS,
) -> Edit:
    """mix_near, near being near to favourites(decode(code), items): to what the row would like best of the concept.

    items [n, d_in]: the embeddings of the concept's items in a head that is linear in the SAE's input. A row whose
    favourites no latent points to gets the weights alone, as all do without items.
    """
    if items.dim() != 2 or items.shape[1] != sae.d_in:
        raise ValueError(f"mix_liked: items must be [n, d_in = {sae.d_in}], got {tuple(items.shape)}")

    def target(code: SparseCode, W: Tensor) -> Tensor:
        return favourites(sae.decode(code), items, sharpness)

    return _mixed_by_row("mix_liked", latents, alpha, sae.W_dec, weights, target)


def favourites(h: Tensor, items: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """The mean of the items weighted by softmax(sharpness * score), score: h @ items.T in standard units of the row.

    h [..., d], items [n, d] -> [..., d]; zeros without an item. sharpness 0: the plain mean; large: the best item.
    """
    if not 0 <= sharpness < math.inf:
        raise ValueError(f"favourites: sharpness must be finite and not negative, got {sharpness}")
    items = items.to(h)
    if len(items) == 0:
        return torch.zeros_like(h)
    scores = h @ items.T
    spread, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
    units = (scores - mean) / spread.clamp(min=torch.finfo(scores.dtype).tiny)
    return (sharpness * units).softmax(-1) @ items


def _mixed_by_row(
    op: str,
    latents: Latents,
    alpha: float,
    W_dec: Tensor,
    weights: Tensor | Sequence[float] | None,
    target: Callable[[SparseCode, Tensor], Tensor],
) -> Edit:
    """mix with weights times the positive part of <W_dec[f], target(code, W_dec)>."""
    chosen = _latents(op, latents)
    mix(latents, alpha, weights)  # for its checks
    if W_dec.dim() != 2:
        raise ValueError(f"{op}: W_dec must be [d_sae, d], got {tuple(W_dec.shape)}")
    worth = torch.ones(chosen.numel()) if weights is None else torch.as_tensor(weights)

    def edit(code: SparseCode) -> SparseCode:
        if W_dec.shape[0] != code.d_sae:
            raise ValueError(f"{op}: W_dec {tuple(W_dec.shape)} must have d_sae = {code.d_sae} rows")
        _check_range(code, chosen)
        W = W_dec.detach().to(code.values)
        near = (target(code, W) @ W[chosen].T).relu()
        share = near * worth.to(near)
        share = torch.where(share.sum(-1, keepdim=True) > 0, share, worth.to(near))
        share = share / share.sum(-1, keepdim=True)
        return _with_slots(code, code.values * (1 - alpha), chosen, alpha * _mass(code) * share)

    return edit


def direction(vector: Tensor, amount: float) -> Edit:
    """Moves x_hat by amount * vector, past the latents; vector [d_in] lives where the SAE's normalised input does.

    With a normaliser that scales each row, long and short histories are so moved alike. Codes stay as they are.
    """
    if not isinstance(vector, Tensor) or vector.dim() != 1 or not vector.is_floating_point():
        came = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"direction: vector must be a floating tensor [d_in], got {came}")
    if not bool(vector.isfinite().all()) or not math.isfinite(amount):
        raise ValueError("direction: vector and amount must be finite")

    def edit(code: SparseCode) -> SparseCode:
        step = amount * vector.to(code.values)
        step = step if code.scale is None else step * code.scale
        return dataclasses.replace(code, offset=step if code.offset is None else code.offset + step)

    return edit


def set_(latents: Latents, value: float | Tensor) -> Edit:
    """The latents take this value in every row; value: a number, or one per latent [m]."""
    chosen, value = _latents("set_", latents), _amount("set_", "value", value, latents)
    return lambda code: _with_slots(code, _without(code, chosen), chosen, value)


def add(latents: Latents, amount: float | Tensor) -> Edit:
    """The amount is added to the latents in every row, firing or not; amount: a number, or one per latent [m]."""
    chosen, amount = _latents("add", latents), _amount("add", "amount", amount, latents)
    return lambda code: _with_slots(code, code.values, chosen, amount)


def scale(latents: Latents, factor: float) -> Edit:
    """The latents are multiplied by the factor where they fire."""
    chosen = _latents("scale", latents)
    _amount("scale", "factor", factor, 0)

    def edit(code: SparseCode) -> SparseCode:
        return code.replace(values=torch.where(_hits(code, chosen), code.values * factor, code.values))

    return edit


def suppress(latents: Latents) -> Edit:
    """The latents fire nowhere."""
    chosen = _latents("suppress", latents)
    return lambda code: code.replace(values=_without(code, chosen))


def clamp(latents: Latents, low: float | None = None, high: float | None = None) -> Edit:
    """The latents are brought into [low, high] in every row; low > 0 makes them fire everywhere."""
    chosen = _latents("clamp", latents)
    if low is None and high is None:
        raise ValueError("clamp: low, high or both must be given")
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"clamp: low must not be above high, got {low} and {high}")

    def edit(code: SparseCode) -> SparseCode:
        same = code.indices.unsqueeze(-1) == chosen.to(code.indices)
        total = torch.where(same, code.values.unsqueeze(-1), 0).sum(-2)
        return _with_slots(code, _without(code, chosen), chosen, total.clamp(low, high))

    return edit


def chain(*edits: Edit) -> Edit:
    """One edit after the other, from left to right; none at all changes nothing."""

    def edit(code: SparseCode) -> SparseCode:
        for one in edits:
            code = one(code)
        return code

    return edit


def _mass(code: SparseCode) -> Tensor:
    """The sum of the sizes of every row's activations, [..., 1]; the slots of one latent are one activation."""
    latents, order = code.indices.sort(-1)
    new = torch.zeros_like(latents)
    new[..., 1:] = latents[..., 1:] != latents[..., :-1]
    whole = torch.zeros_like(code.values).scatter_add(-1, new.long().cumsum(-1), code.values.gather(-1, order))
    # not abs, which passes no gradient to a slot of value 0
    return torch.where(whole < 0, -whole, whole).sum(-1, keepdim=True)


def _latents(op: str, latents: Latents) -> Tensor:
    chosen = torch.as_tensor(latents).cpu().reshape(-1)
    if chosen.numel() == 0:
        return chosen.long()
    if chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex():
        raise TypeError(f"{op}: latents must be integers, got {chosen.dtype}")
    if int(chosen.min()) < 0 or chosen.unique().numel() != chosen.numel():
        raise ValueError(f"{op}: latents must be distinct and not negative, got {chosen.tolist()[:20]}")
    return chosen.long()


def _amount(op: str, name: str, amount: float | Tensor, latents: Latents) -> Tensor:
    amount, m = torch.as_tensor(amount), torch.as_tensor(latents).numel()
    if amount.shape not in ((), (m,)):
        raise ValueError(f"{op}: {name} must be one number or one per latent, ({m},), got {tuple(amount.shape)}")
    if bool(amount.isnan().any()):
        raise ValueError(f"{op}: {name} must not be NaN")
    return amount


def _check_range(code: SparseCode, chosen: Tensor) -> None:
    if chosen.numel() and int(chosen.max()) >= code.d_sae:
        raise ValueError(f"edit: latents must be in [0, d_sae = {code.d_sae}), got {int(chosen.max())}")


def _hits(code: SparseCode, chosen: Tensor) -> Tensor:
    _check_range(code, chosen)
    return torch.isin(code.indices, chosen.to(code.indices))


def _without(code: SparseCode, chosen: Tensor) -> Tensor:
    return torch.where(_hits(code, chosen), 0, code.values)


def _with_slots(code: SparseCode, values: Tensor, chosen: Tensor, amount: Tensor) -> SparseCode:
    """The code with these values and m more slots; amount broadcasts to [..., m]."""
    _check_range(code, chosen)
    shape = (*values.shape[:-1], chosen.numel())
    return code.replace(
        values=torch.cat([values, amount.to(values).expand(shape)], -1),
        indices=torch.cat([code.indices, chosen.to(code.indices).expand(shape)], -1),
    )
