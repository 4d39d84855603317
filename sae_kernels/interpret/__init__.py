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
from .detectors import DetectorScores, audience_tiles, detector_scores, lens_tiles
from .examples import Example, item_codes, item_embeddings, latent_examples
from .explanations import Explanation, Reason, explain
from .lens import lens_items, logit_lens
from .readings import Reading, concept_readings, readings_table
from .selectivity import Selectivity, concept_selectivity, explained_share, latent_table, selectivity
from .tags import TagTable, tag_table

__all__ = [
    "ConceptLatent",
    "ConceptMap",
    "ConceptScores",
    "DetectorScores",
    "Example",
    "Explanation",
    "Intervals",
    "Reading",
    "Reason",
    "Selectivity",
    "TagTable",
    "audience_tiles",
    "best_latents",
    "bootstrap_intervals",
    "concept_auc",
    "concept_map",
    "concept_mass",
    "concept_readings",
    "concept_scores",
    "concept_selectivity",
    "concept_tfidf",
    "detector_scores",
    "explain",
    "explained_share",
    "item_codes",
    "item_embeddings",
    "latent_examples",
    "latent_table",
    "lens_items",
    "lens_tiles",
    "logit_lens",
    "name_latents",
    "readings_table",
    "selectivity",
    "tag_table",
    "untrained",
]
