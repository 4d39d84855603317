from .extract import extract, repair
from .inputs import Batch, CallableInputs, Inputs, as_inputs
from .stream import ActivationStream, collect_stats

__all__ = [
    "ActivationStream",
    "Batch",
    "CallableInputs",
    "Inputs",
    "as_inputs",
    "collect_stats",
    "extract",
    "repair",
]
