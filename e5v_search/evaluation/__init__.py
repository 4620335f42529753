"""How good a space of embeddings is: measures over vectors."""

from e5v_search.evaluation.gap import Gap, modality_gap

__all__ = ["Gap", "modality_gap"]
