"""The stages of the demo, one function each: data, recommender, SAE, figures, concepts, steering."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._seed import mix_seed
from ..data import (
    Histories,
    Interactions,
    TargetSplit,
    leave_last_out,
    load,
    read_interactions,
    simulate,
    split_targets,
    split_users,
)
from ..eval.ranking import rank_metrics
from ..eval.reconstruction import ReconstructionMetrics, reconstruction_metrics
from ..hooks import attach, record
from ..nn import TopKSAE
from ..recommenders import ELSA, MultVAE, SASRec, fit_collaborative, fit_sequential
from ..train import FitResult, fit, from_model
from ..train.sources import as_source

K = 20  # the length of a recommendation list
ROWS = 1024  # rows of one SAE step
KEEP = (0.2, 1.0)  # the share of a history that a random sub-history keeps
STARTED = 16  # batches of rows whose mean an SAE starts from
COUNTED = 64  # batches on which it is counted how often each latent fires
REFIT = 4  # steps in which a trained SAE fits the values of its code
LR, DECAY = 2e-3, 0.9  # of the SAE: faster, or flat for longer, more latents of MultVAE and SASRec die
POSITIONS = 60_000  # positions of sequences on which latents are compared with concepts


@dataclass(frozen=True)
class Recipe:
    """How one recommender is trained: d, epochs, batch size and learning rate for simulated and for real data."""

    d: tuple[int, int]
    epochs: tuple[int, int]
    batch: tuple[int, int]
    lr: tuple[float, float]


RECIPES = {
    "elsa": Recipe((64, 256), (12, 5), (256, 1024), (3e-3, 3e-3)),
    "multvae": Recipe((64, 128), (30, 30), (256, 256), (1e-3, 1e-3)),
    "sasrec": Recipe((64, 64), (8, 20), (128, 128), (1e-3, 1e-3)),
}


@dataclass(frozen=True)
class Parts:
    """train: whole histories of the training users; test: inputs and targets of the held-out users."""

    data: Interactions
    train: Histories
    test: TargetSplit


def load_data(config: Any) -> Interactions:
    """The simulation, a known folder or a file of interactions; ValueError where the options do not go together."""
    columns = (config.user_col, config.item_col, config.rating_col, config.time_col, config.min_rating)
    if config.interactions is None and any(value is not None for value in columns):
        raise ValueError(
            "--user-col, --item-col, --rating-col, --time-col and --min-rating go with --interactions FILE"
        )
    if config.interactions is not None:
        if config.user_col is None or config.item_col is None:
            raise ValueError("--interactions needs --user-col and --item-col, the names of its columns")
        if config.user_col == config.item_col:
            raise ValueError(f"--user-col and --item-col must be two columns, got {config.user_col!r} for both")
        return read_interactions(
            config.interactions, *columns[:4], min_rating=config.min_rating, min_user=5, duplicates="last"
        )
    if config.data is not None:
        return load(config.data)
    # sharp tastes and some order: concepts can be found from sets of items and from sequences alike
    return simulate(*config.simulate, seed=config.seed, taste=4.0, order=0.4)


def split(data: Interactions, config: Any) -> Parts:
    """10 % of the users are held out. Of those, targets are 20 % of the items, or the last item of a sequence."""
    if config.model == "sasrec" and data.order is None:
        raise ValueError(f"{data.name} has no time order, which sasrec needs: give --time-col, or take elsa or multvae")
    histories = data.histories()
    train, held_out = split_users(len(histories), 0.1, config.seed)
    test = histories.select(held_out)
    test = leave_last_out(test) if config.model == "sasrec" else split_targets(test, 0.2, config.seed)
    if len(test.inputs) == 0:
        raise ValueError(f"{data.name}: none of the {len(held_out)} held-out users has an item to keep and one to find")
    if data.n_items < K:
        raise ValueError(f"{data.name}: {data.n_items} items; lists of {K} need as many")
    return Parts(data, histories.select(train), test)


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What another run was and this one is, as text; empty where they are the same run."""
    return "; ".join(
        f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in now if then.get(name) != now[name]
    )


def new_recommender(parts: Parts, config: Any) -> nn.Module:
    make = {"elsa": ELSA, "multvae": MultVAE, "sasrec": SASRec}[config.model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make(parts.data.n_items, config.d)


def train_recommender(model: nn.Module, parts: Parts, config: Any, progress: Callable | None) -> Any:
    recipe, real = RECIPES[config.model], int(config.real)
    train = fit_sequential if config.model == "sasrec" else fit_collaborative
    return train(
        model,
        parts.train,
        epochs=config.epochs,
        batch_size=recipe.batch[real],
        lr=recipe.lr[real],
        seed=config.seed,
        progress=progress,
    )


def new_sae(model: nn.Module, parts: Parts, config: Any, kind: type[TopKSAE] = TopKSAE, **options: Any) -> TopKSAE:
    """An untrained SAE of config.width * config.d latents about the mean of rows drawn as in training; options: as
    `kind` takes them, before those of config.
    """
    generator = torch.Generator().manual_seed(config.seed)
    options = {"normalize": config.normalize, **options}
    sae = kind(config.d, config.width * config.d, config.k, generator=generator, **options)
    rows = torch.cat(list(fresh_rows(model, parts, config, 1, STARTED)))
    if options["normalize"] == "global":
        sae.fit_normalizer(rows)
    sae.init_b_dec(rows)
    return sae


def train_sae(sae: TopKSAE, model: nn.Module, parts: Parts, config: Any, **options: Any) -> FitResult:
    """config.steps steps on the training users' embeddings; options: as `fit` takes them."""
    source = training_source(model, parts, config)
    recipe = {"steps": config.steps, "batch_size": ROWS, "lr": LR, "decay": DECAY, "seed": config.seed}
    return fit(sae, source, **recipe, **options)


def training_source(model: nn.Module, parts: Parts, config: Any) -> object:
    """Embeddings of random sub-histories (KEEP of the items), or the positions of random sequences."""
    train = parts.train
    if config.model == "sasrec":

        def sequences(step: int, generator: torch.Generator) -> Tensor:
            return train.padded(torch.randint(len(train), (128,), generator=generator), model.max_len)

        return from_model(model, model.hook_point, sequences, mask=_is_item, batch_size=ROWS, seed=config.seed)

    def sub_histories(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(train), (ROWS,), generator=generator)
        with torch.no_grad():
            return model.encode_histories(*train.sub_histories(rows, KEEP, generator).bags())

    return sub_histories


def _is_item(sequences: Tensor) -> Tensor:
    return sequences != 0


@torch.no_grad()
def embeddings(model: nn.Module, histories: Histories, batch: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """(embeddings [rows, d], items [rows]) at the hook point: of whole histories (item -1), or of every position."""
    model.eval()
    for rows in torch.arange(len(histories)).split(batch):
        if not isinstance(model, SASRec):
            yield model.encode_histories(*histories.bags(rows)), torch.full((len(rows),), -1)
            continue
        sequences = histories.padded(rows, model.max_len)
        with record(model, model.hook_point, mask=_is_item) as rec:
            model(sequences)
        yield rec.activations, sequences[sequences != 0] - 1


def reconstruction(model: nn.Module, sae: TopKSAE, histories: Histories) -> ReconstructionMetrics:
    return reconstruction_metrics(sae, (x for x, _ in embeddings(model, histories)))


@torch.no_grad()
def norm_ratio(model: nn.Module, sae: TopKSAE, histories: Histories) -> float:
    """sum |x_hat| over sum |x|: 1 where the scale is kept. A cosine does not see it, a nonlinear decoder does."""
    made = given = 0.0
    for x, _ in embeddings(model, histories):
        given += float(x.norm(dim=1).sum())
        made += float(sae(x).norm(dim=1).sum())
    return made / given if given else float("nan")


def reconstruction_as_trained(model: nn.Module, sae: TopKSAE, parts: Parts, config: Any) -> ReconstructionMetrics:
    """On COUNTED fresh batches of what the SAE was trained on: other sub-histories, other sequences."""
    return reconstruction_metrics(sae, fresh_rows(model, parts, config, 2, COUNTED))


def fresh_rows(model: nn.Module, parts: Parts, config: Any, stream: int, batches: int) -> Iterator[Tensor]:
    """Batches drawn as in training, but others; different ones for each `stream` of at least 1."""
    seed = mix_seed(config.seed, stream)
    source = as_source(training_source(model, parts, replace(config, seed=seed)), ROWS, seed)
    return (source.next() for _ in range(batches))


def ranking(model: nn.Module, parts: Parts, sae: TopKSAE | None = None, k: int = K) -> dict[str, float]:
    """ndcg@k and recall@k on the held-out users, with the SAE in place where one is given."""
    if sae is None:
        found = rank_metrics(model, parts.test.inputs, parts.test.targets, k)
    else:
        with attach(model, model.hook_point, sae, positions=model.positions):
            found = rank_metrics(model, parts.test.inputs, parts.test.targets, k)
    return {name: float(found[name]) for name in (f"ndcg@{k}", f"recall@{k}")}


@torch.no_grad()
def coded_items(model: nn.Module, sae: TopKSAE, parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows to interpret latents by: (values [n, k], indices [n, k], items [n], embeddings [n, d]).

    Each item as a history of its own; for a sequence model every position of the training sequences, up to POSITIONS,
    as the item that stands there.
    """
    if not isinstance(model, SASRec):
        items = Histories.one_item_each(parts.data.n_items)
        x = torch.cat([x for x, _ in embeddings(model, items)])
        item = torch.arange(parts.data.n_items)
    else:
        found, rows = [], 0
        for part in embeddings(model, parts.train):
            found.append(part)
            rows += len(part[0])
            if rows >= POSITIONS:
                break
        x, item = (torch.cat(column)[:POSITIONS] for column in zip(*found, strict=True))
    codes = [sae.encode(part) for part in x.split(4096)]
    return torch.cat([c.values for c in codes]), torch.cat([c.indices for c in codes]), item, x


def save_recommender(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def restore_recommender(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
    model.eval()
