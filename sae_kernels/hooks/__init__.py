from .attach import AttachHandle, attach
from .record import record

__all__ = ["AttachHandle", "attach", "record"]
