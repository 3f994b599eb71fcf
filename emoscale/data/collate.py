"""From utterances to packed micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from emoscale.batch import Batch, Targets, Utterance
from emoscale.config import DataError
from emoscale.data.frames import Frames, finite, laid
from emoscale.data.masking import MaskingPlan, MaskSpec, Sizes
from emoscale.data.tokens import Features, TextEncoder, Tokens


@dataclass
class Encoded:
    """One utterance ready to be packed."""

    sizes: Sizes
    tokens: Tokens
    visual: np.ndarray | Frames
    acoustic: np.ndarray | Frames
    emotion: np.ndarray
    label: int = -1
    prompt: int = -1
    """Position of the prompt's [MASK] in the text, -1 without a prompt."""
    text_features: np.ndarray | Frames | None = None
    """None in a corpus without them."""

    @property
    def length(self) -> int:
        """Tokens it takes in the packed tensor."""
        return len(self.tokens.ids) + self.spoken + len(self.visual) + len(self.acoustic)

    @property
    def spoken(self) -> int:
        """Text features of this utterance."""
        return 0 if self.text_features is None else len(self.text_features)

    def without(self, modality: str) -> Encoded:
        """Give the utterance as if it had no such modality; itself for an empty name."""
        if modality == "text":
            return replace(self.without_text_features(), tokens=self.tokens.bare, sizes=replace(self.sizes, words=0))
        if modality == "visual":
            return replace(self, visual=self.visual[:0], emotion=self.emotion[:0], sizes=replace(self.sizes, visual=0))
        return replace(self, acoustic=self.acoustic[:0], sizes=replace(self.sizes, acoustic=0)) if modality else self

    def without_text_features(self) -> Encoded:
        """Give the utterance with its words alone."""
        return self if self.text_features is None else replace(self, text_features=self.text_features[:0])

    def prompted(self, encoder: TextEncoder, template: str) -> Encoded:
        """Give the utterance with its text in a template."""
        tokens = encoder.prompted(self.tokens, template)
        return replace(self, tokens=tokens, prompt=int(np.flatnonzero(tokens.ids == encoder.mask)[-1]))


class Encoder:
    """Turns stored utterances into `Encoded` ones: tokenised, cut, normalised.

    Args:
        text: tokenizer with its limits.
        visual, acoustic: widths, caps and constants of the corpus' manifest.
        classes: expression classes of the teacher; 0 = no teacher.
        text_features: as `visual`, where the corpus has them.
    """

    def __init__(self, text: TextEncoder, visual: Features, acoustic: Features, classes: int, text_features: Features | None = None) -> None:
        self.text, self.visual, self.acoustic, self.classes, self.text_features = text, visual, acoustic, classes, text_features

    def __call__(self, utterance: Utterance, turn: int = 0) -> Encoded | None:
        """Encode one utterance; None where a feature is not finite (the caller names and counts it)."""
        if not all(map(finite, (utterance.visual, utterance.acoustic, utterance.visual_emotion, utterance.text_features))):
            return None
        tokens = self.text(utterance.text)
        visual, acoustic = self.visual(utterance.visual, utterance), self.acoustic(utterance.acoustic, utterance)
        emotion = self._emotion(utterance, len(visual))
        words = int(tokens.words.max(initial=-1)) + 1
        sizes = Sizes(utterance.id, turn, words, len(visual), len(acoustic))
        spoken = self.text_features(utterance.text_features, utterance) if self.text_features is not None else None
        return Encoded(sizes, tokens, visual, acoustic, emotion, text_features=spoken)

    def _emotion(self, utterance: Utterance, frames: int) -> np.ndarray:
        if frames == 0 or self.classes == 0:
            return np.zeros((frames, self.classes), np.float32)
        emotion = utterance.visual_emotion[:frames].astype(np.float32)
        if emotion.shape != (frames, self.classes):
            found = utterance.visual_emotion.shape
            raise DataError(f"{utterance.id}: visual_emotion has shape {found}, not [{len(utterance.visual)}, {self.classes}]; prepare the corpus again")
        return emotion


def split(items: list[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Cut a rank's share of a global batch into micro-batches of at most `max_tokens`, like lengths together."""
    bins: list[list[Encoded]] = []
    filled = max_tokens + 1
    for item in sorted(items, key=lambda item: (item.length, item.sizes.id)):
        if filled + item.length > max_tokens:
            bins.append([])
            filled = 0
        bins[-1].append(item)
        filled += item.length
    return bins


def pack(items: list[Encoded], *, plan: MaskingPlan | None = None, encoder: TextEncoder | None = None, step: int = 0) -> Batch:
    """Pack utterances behind one another, withhold what the plan says, and list what each objective must predict."""
    tasks: list[MaskSpec | None] = [None] * len(items)
    if plan is not None:
        whole = [item.sizes for item in items]
        tasks = plan.assign(whole, step)
        items = [item.without(modality) for item, modality in zip(items, plan.left_out(whole, tasks), strict=True)]
        # Text features tell the words: nobody is asked for a withheld word with them in sight.
        items = [item.without_text_features() if task is not None and task.modality == "text" else item for item, task in zip(items, tasks, strict=True)]
        items = [
            item.prompted(encoder, task.template) if task is not None and task.template and encoder is not None else item
            for item, task in zip(items, tasks, strict=True)
        ]
    sizes = [item.sizes for item in items]
    lengths = np.array([item.length for item in items], np.int64)
    starts = np.cumsum(lengths) - lengths
    text_lengths = np.array([len(item.tokens.ids) for item in items], np.int64)
    spoken_lengths = np.array([item.spoken for item in items], np.int64)
    visual_lengths = np.array([len(item.visual) for item in items], np.int64)
    acoustic_lengths = np.array([len(item.acoustic) for item in items], np.int64)
    text_rows, text_positions = _rows(starts, text_lengths)
    spoken_rows, spoken_positions = _rows(starts + text_lengths, spoken_lengths)
    visual_rows, visual_positions = _rows(starts + text_lengths + spoken_lengths, visual_lengths)
    acoustic_rows, acoustic_positions = _rows(starts + text_lengths + spoken_lengths + visual_lengths, acoustic_lengths)
    text = np.concatenate([item.tokens.ids for item in items])
    masks = {"visual": np.zeros(len(visual_rows), bool), "acoustic": np.zeros(len(acoustic_rows), bool)}
    targets: dict[str, Targets] = {}
    for spec in plan.specs if plan is not None else []:
        assert plan is not None  # it gave the specs
        members = [i for i, task in enumerate(tasks) if task is spec]
        if spec.modality == "text":
            assert encoder is not None
            places, wanted = _mask_text(items, members, text, text_lengths, plan, encoder, spec)
            rows = text_rows[places]
        else:
            of_modality, rows_of = (visual_lengths, visual_rows) if spec.modality == "visual" else (acoustic_lengths, acoustic_rows)
            wanted = _mask_frames(sizes, members, of_modality, masks[spec.modality], plan, spec)
            rows = rows_of[wanted]
            if spec.template:
                rows, wanted = _ask_once(items, members, of_modality, starts)
        targets[spec.name] = Targets(torch.from_numpy(rows), torch.from_numpy(wanted))
    spoken = [item.text_features for item in items if item.text_features is not None]
    return Batch(
        ids=[item.id for item in sizes],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        text=torch.from_numpy(text),
        text_rows=torch.from_numpy(text_rows),
        text_positions=torch.from_numpy(text_positions),
        visual=laid([item.visual for item in items]),
        visual_rows=torch.from_numpy(visual_rows),
        visual_positions=torch.from_numpy(visual_positions),
        visual_masked=torch.from_numpy(masks["visual"]),
        visual_emotion=laid([item.emotion for item in items]),
        acoustic=laid([item.acoustic for item in items]),
        acoustic_rows=torch.from_numpy(acoustic_rows),
        acoustic_positions=torch.from_numpy(acoustic_positions),
        acoustic_masked=torch.from_numpy(masks["acoustic"]),
        targets=targets | _label_targets(items, starts, text_rows, text_lengths),
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        text_features=laid(spoken) if spoken else None,
        text_features_rows=torch.from_numpy(spoken_rows) if spoken else None,
        text_features_positions=torch.from_numpy(spoken_positions) if spoken else None,
    )


def _rows(firsts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give (packed rows, positions within each utterance) of stretches that start at `firsts`."""
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(firsts, lengths) + positions, positions


def _mask_text(
    items: list[Encoded],
    members: list[int],
    text: np.ndarray,
    lengths: np.ndarray,
    plan: MaskingPlan,
    encoder: TextEncoder,
    spec: MaskSpec,
) -> tuple[np.ndarray, np.ndarray]:
    if not members:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows, _ = _rows((np.cumsum(lengths) - lengths)[members], lengths[members])
    shown, positions = plan.words_of([items[i].sizes for i in members], [items[i].tokens for i in members], encoder, spec)
    places = rows[positions]
    wanted = text[places]
    text[rows] = shown
    return places, wanted


def _mask_frames(sizes: list[Sizes], members: list[int], lengths: np.ndarray, masked: np.ndarray, plan: MaskingPlan, spec: MaskSpec) -> np.ndarray:
    if not members:
        return np.zeros(0, np.int64)
    chosen, _ = _rows((np.cumsum(lengths) - lengths)[members], lengths[members])
    withheld = chosen[plan.frames([sizes[i] for i in members], spec)]
    masked[withheld] = True
    return withheld


def _ask_once(items: list[Encoded], members: list[int], lengths: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give (packed rows of each prompt's [MASK], then of each [CLS]; the utterance's middle frame for both)."""
    first = starts[members]
    masks = first + np.array([items[i].prompt for i in members], np.int64)
    middle = (np.cumsum(lengths) - lengths)[members] + lengths[members] // 2
    return np.concatenate([masks, first]), np.concatenate([middle, middle])


def _label_targets(items: list[Encoded], starts: np.ndarray, text_rows: np.ndarray, lengths: np.ndarray) -> dict[str, Targets]:
    """List what a head predicts: the class from the [CLS] row, or from the prompt's [MASK]."""
    if any(item.label < 0 for item in items):
        return {}
    labels = torch.tensor([item.label for item in items], dtype=torch.int64)
    targets = {"classify": Targets(torch.from_numpy(starts), labels)}
    if all(item.prompt >= 0 for item in items):
        places = np.cumsum(lengths) - lengths + np.array([item.prompt for item in items])
        targets["prompt"] = Targets(torch.from_numpy(text_rows[places]), labels)
    return targets


def utterance_or_none(utterance: Utterance, encoder: Encoder, turn: int) -> Encoded | None:
    """Encode an utterance that has anything to learn from; None otherwise."""
    item = encoder(utterance, turn)
    return item if item is not None and item.sizes.words + item.spoken + item.sizes.visual + item.sizes.acoustic > 0 else None
