"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType


def need(module: str, purpose: str, extra: str) -> ModuleType:
    """Imports an optional dependency. Raises ImportError saying which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f"{purpose} needs {error.name}: pip install 'sae-kernels[{extra}]'") from None
