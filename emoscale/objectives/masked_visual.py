"""Span-masked visual frame regression."""

from __future__ import annotations

from emoscale.objectives.masked_frames import MaskedFrames


class MaskedVisual(MaskedFrames):
    """`MaskedFrames` over the speaker's face (SpanMVFR)."""

    modality = "visual"
