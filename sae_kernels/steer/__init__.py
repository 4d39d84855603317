from .calibrate import calibrated, concept_shares, dhondt
from .edits import Edit, add, chain, clamp, direction, mix, mix_all, scale, set_, suppress
from .evaluate import SteeringRow, attached, steering_table
from .profiles import cohens_d, group_code, popularity_latents, user_popularity
from .serve import ItemHead, SteeredRanker, Users

__all__ = [
    "Edit",
    "ItemHead",
    "SteeredRanker",
    "SteeringRow",
    "Users",
    "add",
    "attached",
    "calibrated",
    "chain",
    "clamp",
    "cohens_d",
    "concept_shares",
    "dhondt",
    "direction",
    "group_code",
    "mix",
    "mix_all",
    "popularity_latents",
    "scale",
    "set_",
    "steering_table",
    "suppress",
    "user_popularity",
]
