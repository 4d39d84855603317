from .store import ActivationStore, Damage
from .writer import RowWriter, StoreWriter

__all__ = ["ActivationStore", "Damage", "RowWriter", "StoreWriter"]
