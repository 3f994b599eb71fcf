"""Pre-training objectives: one file each and one line here."""

from __future__ import annotations

from emoscale.objectives.base import Objective
from emoscale.objectives.consistency import Consistency
from emoscale.objectives.masked_acoustic import MaskedAcoustic
from emoscale.objectives.masked_text import MaskedText
from emoscale.objectives.masked_visual import MaskedVisual
from emoscale.objectives.target_search import AcousticSearch, DialogueObjective, FusedSearch, TextSearch
from emoscale.objectives.utterance_emotion import UtteranceEmotion
from emoscale.objectives.visual_emotion import VisualEmotion

OBJECTIVES: dict[str, type[Objective]] = {
    "masked_text": MaskedText,
    "masked_acoustic": MaskedAcoustic,
    "masked_visual": MaskedVisual,
    "visual_emotion": VisualEmotion,
    "utterance_emotion": UtteranceEmotion,
}

DIALOGUE_OBJECTIVES: dict[str, type[DialogueObjective]] = {
    "text_search": TextSearch,
    "acoustic_search": AcousticSearch,
    "fused_search": FusedSearch,
    "consistency": Consistency,
}
"""Those of dialogue windows."""

__all__ = ["DIALOGUE_OBJECTIVES", "OBJECTIVES", "DialogueObjective", "Objective"]
