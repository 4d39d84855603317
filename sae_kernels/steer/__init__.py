from .edits import Edit, add, chain, clamp, mix, scale, set_, suppress
from .evaluate import SteeringRow, attached, steering_table

__all__ = [
    "Edit",
    "SteeringRow",
    "add",
    "attached",
    "chain",
    "clamp",
    "mix",
    "scale",
    "set_",
    "steering_table",
    "suppress",
]
