from .datasets import load
from .histories import Histories
from .interactions import Concepts, Interactions
from .read import read_interactions
from .simulate import simulate
from .split import TargetSplit, leave_last_out, split_targets, split_users

__all__ = [
    "Concepts",
    "Histories",
    "Interactions",
    "TargetSplit",
    "leave_last_out",
    "load",
    "read_interactions",
    "simulate",
    "split_targets",
    "split_users",
]
