"""Pre-training objectives: one file each and one line here."""

from __future__ import annotations

from emoscale.objectives.base import Objective
from emoscale.objectives.consistency import Consistency
from emoscale.objectives.image_emotion import ImageEmotion
from emoscale.objectives.image_sequence_emotion import ImageSequenceEmotion
from emoscale.objectives.masked_acoustic import MaskedAcoustic
from emoscale.objectives.masked_text import MaskedText
from emoscale.objectives.masked_turns import MaskedTurns
from emoscale.objectives.masked_visual import MaskedVisual
from emoscale.objectives.response import Response
from emoscale.objectives.response_emotion import ResponseEmotion
from emoscale.objectives.target_search import AcousticSearch, DialogueObjective, FusedSearch, TextSearch
from emoscale.objectives.turns import TurnObjective
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

RESPONSE_OBJECTIVES: dict[str, type[TurnObjective]] = {
    "image_emotion": ImageEmotion,
    "image_sequence_emotion": ImageSequenceEmotion,
    "masked_turns": MaskedTurns,
    "response": Response,
    "response_emotion": ResponseEmotion,
}
"""Those of turns with pictures and the response to them."""

__all__ = ["DIALOGUE_OBJECTIVES", "OBJECTIVES", "RESPONSE_OBJECTIVES", "DialogueObjective", "Objective", "TurnObjective"]
