"""SparseCode: what an SAE hands between encode and decode."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class SparseCode:
    """The k chosen latents of every row; all others are 0.

    values [..., k] floating; indices [..., k] int32 or int64, in [0, d_sae), repeats allowed (their values add up).
    scale and offset, broadcastable to [..., d_in] or None, undo the input normaliser: x_hat = decoded * scale + offset.
    Raises ValueError where the shapes of values and indices differ.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    offset: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        values, indices = self.values, self.indices
        # torch.export puts placeholders without a shape in place of the tensors
        if isinstance(values, Tensor) and isinstance(indices, Tensor) and values.shape != indices.shape:
            shapes = f"values {tuple(values.shape)} and indices {tuple(indices.shape)}"
            raise ValueError(f"SparseCode: {shapes} must both be [..., k]")

    def to_dense(self) -> Tensor:
        """[..., d_sae] in the dtype of values."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def replace(self, *, values: Tensor | None = None, indices: Tensor | None = None) -> "SparseCode":
        """The same code with other values or indices, of any k; the normaliser's terms stay."""
        return SparseCode(
            self.values if values is None else values,
            self.indices if indices is None else indices,
            self.d_sae,
            self.offset,
            self.scale,
        )

    def detach(self) -> "SparseCode":
        offset = None if self.offset is None else self.offset.detach()
        scale = None if self.scale is None else self.scale.detach()
        return SparseCode(self.values.detach(), self.indices, self.d_sae, offset, scale)


torch.export.register_dataclass(SparseCode, serialized_type_name="sae_kernels.SparseCode")
