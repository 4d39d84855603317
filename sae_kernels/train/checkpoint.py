"""Checkpoints: one folder, replaced as a whole; weights in safetensors, the rest in plain tensors and numbers."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._need import need
from .._sync import sync
from .ranks import Ranks
from .shards import read_shards

FORMAT = 1
SHARDS, TENSORS = "shards", "optimizer.pt"
NAMES = {"config.json", "model.safetensors", "training.pt", TENSORS, SHARDS}  # in the folder of one SAE


def save_sae(sae: nn.Module, path: str | os.PathLike) -> None:
    """Writes config.json and model.safetensors of a TopKSAE into the folder `path`, replacing an older one whole.

    Raises TypeError for one whose latents are on several processes: `fit` writes those.
    """
    sae = uncompiled(sae)
    if hasattr(sae, "sharded"):
        raise TypeError("save_sae writes a whole SAE and this one is in parts: train it with fit(checkpoint=...)")
    with replacing(Path(path)) as folder:
        write_sae(folder, sae)


def load_sae(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """The SAE in the folder `path`, of the variant that was saved, in eval mode.

    Raises FileNotFoundError where there is none, ValueError that names what does not fit.
    """
    from ..nn import VARIANTS

    folder = find_folder(Path(path))
    config = read_config(folder)
    variant = config.get("variant", "topk")
    if variant not in VARIANTS:
        raise ValueError(f"{folder}: variant {variant!r} is unknown here; known are {', '.join(VARIANTS)}")
    dtype, unused = getattr(torch, config["dtype"]), torch.Generator(device)  # of the caller's nothing is drawn
    sae = VARIANTS[variant](**config["sae"], device=device, dtype=dtype, generator=unused)
    put_weights(sae, read_weights(folder), folder)
    return sae.eval()


def uncompiled(sae: nn.Module) -> nn.Module:
    """The module itself where torch.compile has wrapped it, under whose names it would be saved else."""
    return getattr(sae, "_orig_mod", sae)


def find_folder(path: Path) -> Path:
    """`path`, or its predecessor where a write was cut between its two renames."""
    path = path.resolve()
    for folder in (path, _beside(path, "old")):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: no checkpoint there (no config.json)")


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'} is not a sae_kernels checkpoint of format {FORMAT}")
    if "grid" in config:
        raise ValueError(f"{folder} holds a grid: name one of its folders, {', '.join(config['grid'])}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint's folder, whole, however many processes wrote it."""
    if (folder / SHARDS).is_dir():
        return with_prefix(read_shards(folder / SHARDS), "model.")
    return need("safetensors.torch", "reading a checkpoint", "train").load_file(folder / "model.safetensors")


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def put_weights(sae: nn.Module, found: dict[str, Tensor], folder: Path) -> None:
    """Strict: raises ValueError naming the missing keys, the unexpected keys and the shapes that differ."""
    wanted = sae.state_dict()
    problems = [
        f"{label}: {', '.join(sorted(keys))}"
        for label, keys in (
            ("missing keys", wanted.keys() - found.keys()),
            ("unexpected keys", found.keys() - wanted.keys()),
        )
        if keys
    ]
    problems += [
        f"{key} is {tuple(found[key].shape)} in the checkpoint and {tuple(wanted[key].shape)} in the module"
        for key in sorted(wanted.keys() & found.keys())
        # the extra state is a text, of any length
        if found[key].shape != wanted[key].shape and not key.endswith("_extra_state")
    ]
    if problems:
        raise ValueError(f"checkpoint {folder} does not fit: {'; '.join(problems)}")
    try:
        sae.load_state_dict(found, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} does not fit: {error}") from None


def write_sae(folder: Path, sae: nn.Module) -> None:
    """config.json and model.safetensors of `sae`, into a folder that may exist."""
    safetensors = need("safetensors.torch", "writing a checkpoint", "train")
    write_config(folder, sae)
    tensors = {key: value.detach().contiguous() for key, value in sae.state_dict().items()}
    safetensors.save_file(tensors, folder / "model.safetensors")


def write_config(folder: Path, sae: nn.Module) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(sae), indent=2) + "\n")


def config_of(sae: nn.Module) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "variant": sae.variant,
        "sae": {name: getattr(sae, name) for name in sae.options},
        "dtype": str(next(sae.parameters()).dtype).removeprefix("torch."),
    }


def other_options(sae: nn.Module, folder: Path) -> list[str]:
    """What decides its training and was otherwise in the folder's config.json; sizes show in the weights."""
    found, now = (
        {"dtype": config["dtype"], **config["sae"]}
        for config in (read_config(folder), json.loads(json.dumps(config_of(sae))))
    )
    names = [name for name in now if name in found and name not in ("d_in", "d_sae", "refit")]
    return [f"{name} was {found[name]!r} and is {now[name]!r}" for name in names if found[name] != now[name]]


def check_replaceable(path: Path, grid: bool = False) -> None:
    """Raises FileExistsError where something stands that a checkpoint must not replace: one SAE takes the place of one
    SAE, a grid that of a grid, and of nothing else. What was put beside their files stays there.
    """
    if not path.exists():
        return
    found = sorted(file.name for file in path.iterdir()) if path.is_dir() else ["a file"]
    config, why = _config_of_ours(path), ""
    if config is None:
        why = f"something that is no checkpoint ({', '.join(found[:4])})" if found else ""
    elif ("grid" in config) != grid:
        why = "one SAE, and a grid would take its place" if grid else "a grid, and one SAE would take its place"
    if why:
        raise FileExistsError(f"{path}: holds {why}; it is not replaced")


def _config_of_ours(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(config, dict) and config.get("format") == FORMAT and ("sae" in config or "grid" in config)
    return config if ours else None


def _carry_over(old: Path, path: Path) -> None:
    """Moves what others have put into the checkpoint at `old`, or into a grid's members, to the one at `path`."""
    members = (_config_of_ours(old) or {}).get("grid", ())
    for folder in (Path(), *(Path(name) for name in members if (old / name).is_dir())):
        for file in (old / folder).iterdir():
            target = path / folder / file.name
            if file.name not in NAMES and file.name not in members and not target.exists():
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)


@contextmanager
def replacing(path: Path, ranks: Ranks | None = None, grid: bool = False) -> Iterator[Path]:
    """A fresh folder beside `path`, synced and renamed into its place at the end of the block: a reader sees the old
    one or the new one. With ranks, all their processes enter; they leave when it is in place."""
    ranks, path = Ranks() if ranks is None else ranks, path.resolve()
    fresh = _beside(path, f"new{ranks.shared(os.getpid())}")
    if ranks.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path, grid)
        _remove_leftovers(path)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
    ranks.barrier()
    yield fresh
    ranks.barrier()
    if ranks.main:
        _put_in_place(fresh, path)
    ranks.barrier()


def _remove_leftovers(path: Path) -> None:
    """The fresh folders of processes that were killed while they wrote."""
    start = _beside(path, "new").name
    for folder in path.parent.iterdir():
        pid = folder.name.removeprefix(start)
        if folder.name.startswith(start) and pid.isdecimal() and not _runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name == "nt":  # where os.kill ends a process whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _put_in_place(fresh: Path, path: Path) -> None:
    for file in fresh.rglob("*"):
        sync(file)
    sync(fresh)
    old = _beside(path, "old")
    if path.exists():
        if old.exists():  # of a process that was killed here
            _carry_over(old, path)
            shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(fresh, path)
    sync(path.parent)
    if old.exists():
        _carry_over(old, path)
        shutil.rmtree(old, ignore_errors=True)


def read_training(folder: Path) -> dict[str, Any]:
    file = folder / "training.pt"
    if not file.is_file():
        raise ValueError(f"{folder}: a finished module, not a training run (no training.pt); it cannot be resumed")
    return torch.load(file, map_location="cpu", weights_only=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
