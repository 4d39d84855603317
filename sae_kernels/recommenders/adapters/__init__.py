"""Recommenders of other libraries behind the interface of ours: histories in, embeddings and scores out."""

from .base import Adapter, CollaborativeAdapter, SequenceAdapter
from .huggingface import from_transformers
from .recbole import from_recbole
from .rectools import from_rectools

__all__ = [
    "Adapter",
    "CollaborativeAdapter",
    "SequenceAdapter",
    "from_recbole",
    "from_rectools",
    "from_transformers",
]
