"""The forms of what stands on disk: keys and the values they may have, so that a file of another form is refused where it is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from emoscale.files import is_plain, stays_inside


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError("lies outside the folder")
    return name


def _inside(name: str) -> str:
    if not stays_inside(name):
        raise ValueError("lies outside the folder")
    return name


Plain = Annotated[str, AfterValidator(_plain)]
"""Name of a file in the folder of the record."""
Inside = Annotated[str, AfterValidator(_inside)]
"""Path of a file somewhere below that folder."""
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
"""Width, number of frames or of word pieces."""
Width = Annotated[int, Field(ge=0, le=1 << 24)]
"""Width of features, 0 where there are none."""
Word = Annotated[int, Field(ge=-1, le=1 << 24)]
"""Number of a word piece, −1 for none."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MORE = ConfigDict(extra="allow", strict=True)
"""Keys that are not listed are kept: a later version may have written them."""


class Stored(TypedDict):
    """One file of a shard."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    basename: Plain
    bytes: Count
    hashes: NotRequired[dict[str, str]]


class Shard(TypedDict):
    """One shard in `index.json`."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    samples: Count
    raw_data: Stored
    column_names: NotRequired[list[str]]
    column_encodings: NotRequired[list[str]]


class Index(TypedDict):
    """`index.json` of a corpus."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    shards: list[Shard]


class EncoderOf(TypedDict):
    """What made features."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    name: str
    revision: NotRequired[str | None]


class Section(TypedDict):
    """Features of one modality; of no width where the corpus has none of it."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    width: Width
    max_frames: Size
    encoder: NotRequired[EncoderOf]
    frame_s: NotRequired[Seconds]
    mean: NotRequired[list[float]]
    std: NotRequired[list[float]]


class Voice(Section):
    """`acoustic` of a manifest."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    raw: NotRequired[Literal["audio"]]


class Face(Section):
    """`visual` of a manifest."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    raw: NotRequired[Literal["faces"]]


class Expressions(TypedDict):
    """`visual_emotion` of a manifest."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    classes: list[str]
    teacher_sha256: NotRequired[str | None]


class Vocabulary(TypedDict):
    """`tokenizer` of a manifest."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    folder: Plain
    sha256: str
    vocab_size: NotRequired[Count]


class Listed(TypedDict):
    """One shard in a manifest."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    file: Plain
    sha256: str
    utterances: NotRequired[Count]


class Listing(TypedDict):
    """What of a manifest tells whether a corpus is as it was written."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    tokenizer: NotRequired[Vocabulary | None]
    shards: NotRequired[list[Listed]]


class Manifest(Listing):
    """`manifest.json` of a corpus, or the copy of it that a model keeps; every part of it may be looked at, so every part is checked."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    counts: NotRequired[dict[str, Count]]
    visual: Face
    acoustic: Voice
    text_features: NotRequired[Section | None]
    visual_emotion: NotRequired[Expressions | None]
    preprocess: NotRequired[dict[str, Any]]
    generation: NotRequired[Count]
    generations: NotRequired[list[dict[str, Count]]]
    inputs_sha256: NotRequired[str]


class Described(TypedDict):
    """Who made the features of a modality."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    width: Width
    encoder: EncoderOf


class Making(TypedDict):
    """What of a manifest tells how its features were made, so that others can be made alike."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    preprocess: dict[str, Any]
    acoustic: Described
    visual: Described
    visual_emotion: Expressions | None


class Counted(TypedDict):
    """What an assembly has counted and summed, for the next one to go on."""

    counts: dict[str, Count]
    frames: dict[str, Count]
    sums: dict[str, tuple[list[float], list[float]]]
    dialogues: list[str]
    speakers: list[str]


class Assembled(TypedDict):
    """What a corpus was assembled of."""

    settings: str
    keys: dict[str, str]
    widths: dict[str, int]
    statistics: Counted


class Row(TypedDict):
    """A line of `ledger.jsonl`."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    path: str
    status: Literal["done", "skipped"]
    reason: NotRequired[str | None]
    utterances: NotRequired[Count]
    notes: NotRequired[dict[str, Count | list[str]] | None]


class Hashes(TypedDict):
    """`manifest.json` of a checkpoint."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    files: dict[Inside, str]


class Stage(TypedDict):
    """What a run knew of its corpora."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    place: Count
    counts: list[Count]
    hashes: list[str]


class Progress(TypedDict):
    """`state.json` of a checkpoint."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    step: Count
    world: Size
    optimizer_steps: Count
    shape: NotRequired[dict[str, Any]]
    tasks: NotRequired[list[str]]
    corpora: NotRequired[list[Stage]]


class Options(TypedDict):
    """`assets/model.json` of a checkpoint."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    shape: dict[str, Any]
    data: dict[str, Any]
    objectives: NotRequired[list[str]]


class Answered(TypedDict):
    """What a fine-tuned model answered, a value per utterance of the test part."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    ids: list[str]
    speakers: list[str]
    truth: list[int]
    predicted: list[int]
    probabilities: list[list[float]]


class Answers(TypedDict):
    """What one arm of fine-tuning left on one fold with one seed."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    made_from: str
    step: Count
    validation: float
    test: float
    labelled: Count
    rows: Answered


class Widths(TypedDict):
    """What every utterance encoder's shape says."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    width: Size
    vocabulary: Size
    visual_width: Width
    acoustic_width: Width


class HeadOf(TypedDict):
    """The head of a model folder."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    name: NotRequired[str]
    options: NotRequired[dict[str, Any]]


class Model(TypedDict):
    """`config.json` of a model folder."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    shape: dict[str, Any]
    head: NotRequired[HeadOf]
    classes: NotRequired[list[str]]
    words: NotRequired[list[Word]]
    template: NotRequired[str]
    modalities: NotRequired[list[Literal["text", "visual", "acoustic"]]]
    max_text: NotRequired[Size]


class Expert(TypedDict):
    """`config.json` of an expression teacher."""

    __pydantic_config__ = MORE  # type: ignore[misc]  # pydantic reads it
    format: int
    classes: list[str]
    side: Annotated[int, Field(ge=16, le=1024)]
    width: Annotated[int, Field(ge=4, le=1024)]
