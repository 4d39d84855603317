from .concepts import (
    ConceptLatent,
    ConceptScores,
    best_latents,
    concept_auc,
    concept_scores,
    concept_tfidf,
    name_latents,
)
from .examples import Example, item_codes, latent_examples

__all__ = [
    "ConceptLatent",
    "ConceptScores",
    "Example",
    "best_latents",
    "concept_auc",
    "concept_scores",
    "concept_tfidf",
    "item_codes",
    "latent_examples",
    "name_latents",
]
