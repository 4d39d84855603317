"""Hugging Face models: texts as inputs, and last_hidden_state as a module that can be named."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..._need import need
from .inputs import CallableInputs

LAST_HIDDEN = "last_hidden_state"


class HuggingFace(nn.Module):
    """A model of transformers in which "last_hidden_state" is a module like any other; its own are under "model.".

        model = HuggingFace(AutoModel.from_pretrained(name))
        extract(model, "last_hidden_state", texts, "acts", mask=model.mask)     # or "model.encoder.layer.3"

    model: a bare model (AutoModel), not one with a head of its own where last_hidden_state is wanted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.last_hidden_state = model, nn.Identity()

    @classmethod
    def load(cls, name: str, **options: Any) -> "HuggingFace":
        """AutoModel.from_pretrained(name, **options): a name on the hub or a folder."""
        transformers = need("transformers", "a Hugging Face model", "hf")
        return cls(transformers.AutoModel.from_pretrained(name, **options))

    def forward(self, **inputs: Tensor) -> Any:
        out = self.model(**inputs)
        if LAST_HIDDEN in out:
            self.last_hidden_state(out.last_hidden_state)
        return out

    @staticmethod
    def mask(**inputs: Tensor) -> Tensor:
        """The tokenizer's attention mask: padding is no row."""
        return inputs["attention_mask"]


def text_inputs(texts: Sequence[str], tokenizer: Any, batch_size: int = 32, max_tokens: int = 256) -> CallableInputs:
    """Batches of tokens, each padded to its longest text; ids are the texts' numbers.

    tokenizer: of transformers, or the name of one. Raises TypeError for anything but texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("text_inputs: texts must be a sequence of str without empty values")
    if isinstance(tokenizer, str):
        tokenizer = need("transformers", "a tokenizer", "hf").AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def make(start: int, stop: int) -> dict[str, Tensor]:
        return dict(
            tokenizer(
                list(texts[start:stop]), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
            )
        )

    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode())
        sha.update(b"\0")
    name = f"texts {sha.hexdigest()[:32]}, {max_tokens} tokens at most"
    return CallableInputs(make, len(texts), batch_size, name, widest=max_tokens)
