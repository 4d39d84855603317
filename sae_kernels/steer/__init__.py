from .calibrate import calibrated, concept_shares, dhondt
from .edits import Edit, add, chain, clamp, direction, mix, mix_all, mix_near, scale, set_, suppress
from .evaluate import STRENGTHS, Lists, SteeringRow, at_loss, attached, compare_steering, pareto_front, steering_table
from .goals import Goals, one_goal, over_represented
from .methods import latent_lists, linear_probes, probe_lists, rerank_lists
from .profiles import cohens_d, group_code, popularity_latents, user_popularity
from .serve import ItemHead, SteeredRanker, Users

__all__ = [
    "STRENGTHS",
    "Edit",
    "Goals",
    "ItemHead",
    "Lists",
    "SteeredRanker",
    "SteeringRow",
    "Users",
    "add",
    "at_loss",
    "attached",
    "calibrated",
    "chain",
    "clamp",
    "cohens_d",
    "compare_steering",
    "concept_shares",
    "dhondt",
    "direction",
    "group_code",
    "latent_lists",
    "linear_probes",
    "mix",
    "mix_all",
    "mix_near",
    "one_goal",
    "over_represented",
    "pareto_front",
    "popularity_latents",
    "probe_lists",
    "rerank_lists",
    "scale",
    "set_",
    "steering_table",
    "suppress",
    "user_popularity",
]
