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
from .explanations import Explanation, Reason, explain
from .lens import lens_items, logit_lens
from .selectivity import Selectivity, concept_selectivity, explained_share, latent_table, selectivity
from .tags import TagTable, tag_table

__all__ = [
    "ConceptLatent",
    "ConceptMap",
    "ConceptScores",
    "Example",
    "Explanation",
    "Intervals",
    "Reason",
    "Selectivity",
    "TagTable",
    "best_latents",
    "bootstrap_intervals",
    "concept_auc",
    "concept_map",
    "concept_mass",
    "concept_scores",
    "concept_selectivity",
    "concept_tfidf",
    "explain",
    "explained_share",
    "item_codes",
    "item_embeddings",
    "latent_examples",
    "latent_table",
    "lens_items",
    "logit_lens",
    "name_latents",
    "selectivity",
    "tag_table",
    "untrained",
]
