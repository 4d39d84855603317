"""Reads a matrix of activations from .npy, .npz, .safetensors or .pt."""

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from .checkpoint import need

KINDS = (".npy", ".npz", ".safetensors", ".pt")


def load_activations(path: str | os.PathLike, key: str | None = None) -> Tensor:
    """The tensor [rows, d_in] in `path`, leading dimensions flattened; float16 and float64 become float32.

    key: which array of a file that holds several; without it, the only floating matrix there.
    Raises FileNotFoundError, or ValueError that names the file and what was found in it.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: activations come from {', '.join(KINDS)} files")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        arrays = _read(path)
    except (zipfile.BadZipFile, EOFError, UnpicklingError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file: {str(error).splitlines()[0]}") from None
    x = _choose(path, arrays, key)
    if x.shape[-1] == 0 or x.numel() == 0:
        raise ValueError(f"{path}: empty, shape {tuple(x.shape)}")
    x = x.reshape(-1, x.shape[-1]).float()
    finite = x.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{path}: row {int((~finite).nonzero()[0])} holds NaN or Inf ({int((~finite).sum())} such rows)"
        )
    return x


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found if isinstance(found, dict) else {"": found}
    if path.suffix == ".safetensors":
        safetensors = need("safetensors.torch", "reading .safetensors", "train")
        try:
            return safetensors.load_file(path)
        except need("safetensors", "reading .safetensors", "train").SafetensorError as error:
            raise ValueError(str(error)) from None
    numpy = need("numpy", f"reading {path.suffix}", "train")
    found = numpy.load(path, allow_pickle=False)
    arrays = {"": found} if path.suffix == ".npy" else {name: found[name] for name in found.files}
    return {name: torch.from_numpy(a) for name, a in arrays.items() if a.dtype.kind in "fiub"}


def _choose(path: Path, arrays: dict[str, object], key: str | None) -> Tensor:
    matrices = {k: v for k, v in arrays.items() if isinstance(v, Tensor) and v.dim() >= 2 and v.is_floating_point()}
    listing = (
        ", ".join(f"{k or 'array'} {tuple(v.shape)}" for k, v in arrays.items() if isinstance(v, Tensor)) or "nothing"
    )
    if key is not None:
        if key not in matrices:
            raise ValueError(f"{path}: no floating matrix named {key!r}; there is {listing}")
        return matrices[key]
    if len(matrices) != 1:
        raise ValueError(
            f"{path}: expected one floating matrix, found {len(matrices)} (there is {listing}); name one with --key"
        )
    return next(iter(matrices.values()))
