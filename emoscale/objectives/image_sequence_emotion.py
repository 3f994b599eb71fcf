"""What expression each picture of a sequence shows."""

from __future__ import annotations

from emoscale.objectives.image_emotion import ImageEmotion


class ImageSequenceEmotion(ImageEmotion):
    """The same divergence for every picture at its own place, those before and behind it in sight, and words where some are masked.

    Source: Tian et al. 2022 (IgERG), `isl` and the image part of `isl_mlm` of the released code.
    """
