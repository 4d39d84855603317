from .checkpoint import load_sae, save_sae
from .loop import FitResult, Interrupted, fit
from .sources import from_model

__all__ = ["FitResult", "Interrupted", "fit", "from_model", "load_sae", "save_sae"]
