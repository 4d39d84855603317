from .bootstrap import Intervals, bootstrap_intervals
from .concept_map import ConceptMap, concept_map, untrained
from .concepts import (
    ConceptLatent,
    ConceptScores,
    best_latents,
    concept_auc,
    concept_mass,
    concept_scores,
    concept_tfidf,
    name_latents,
)
from .examples import Example, item_codes, item_embeddings, latent_examples
from .lens import lens_items, logit_lens
from .tags import TagTable, tag_table

__all__ = [
    "ConceptLatent",
    "ConceptMap",
    "ConceptScores",
    "Example",
    "Intervals",
    "TagTable",
    "best_latents",
    "bootstrap_intervals",
    "concept_auc",
    "concept_map",
    "concept_mass",
    "concept_scores",
    "concept_tfidf",
    "item_codes",
    "item_embeddings",
    "latent_examples",
    "lens_items",
    "logit_lens",
    "name_latents",
    "tag_table",
    "untrained",
]
