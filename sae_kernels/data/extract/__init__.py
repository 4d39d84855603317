from .extract import extract, repair
from .hugging_face import HuggingFace, text_inputs
from .inputs import Batch, CallableInputs, Inputs, as_inputs
from .stream import ActivationStream, collect_stats

__all__ = [
    "ActivationStream",
    "Batch",
    "CallableInputs",
    "HuggingFace",
    "Inputs",
    "as_inputs",
    "collect_stats",
    "extract",
    "repair",
    "text_inputs",
]
