"""Span-masked acoustic frame regression."""

from __future__ import annotations

from emoscale.objectives.masked_frames import MaskedFrames


class MaskedAcoustic(MaskedFrames):
    """`MaskedFrames` over the speaker's voice (SpanMAFR)."""

    modality = "acoustic"
