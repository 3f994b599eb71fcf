"""Responses to dialogues: generated for users, and scored on dialogues that were held out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from emoscale.batch import Utterance
from emoscale.codecs import encode_faces
from emoscale.config import ConfigError, DataError, load
from emoscale.data.collate import Encoder
from emoscale.data.labelled import default_key, read_labels
from emoscale.data.tokens import Pictures, load_tokenizer
from emoscale.data.turns import RESPONSE, Sample, TurnReader, Turns, pack_turns, within
from emoscale.evaluation.generation import Responses, bleu_counts, compare, similarities, unigram_perplexity
from emoscale.forms import Options
from emoscale.models.response import ResponseModel
from emoscale.objectives.response import word_losses
from emoscale.records import read_arrays, read_json, read_lines
from emoscale.serving.hub import EmotionModel
from emoscale.serving.hub import load as load_model
from emoscale.training import checkpoint
from emoscale.training.corpora import make_encoder, open_all, open_corpora, read_held_out
from emoscale.training.heldout import only_held_out
from emoscale.training.heldout_dialogues import Held
from emoscale.training.run import RunConfig

log = logging.getLogger("emoscale")
MAX_TOKENS = 16_384
DECODING: dict[str, Any] = {"num_beams": 5}
"""Beam search over five hypotheses, as the released code decodes."""
ROW = ("dialogue", "id", "text", "visual", "picture", "media")
"""What a turn of a file of dialogues may say."""
SAMPLES = 12
"""Responses that a result shows."""


class Responder(EmotionModel):
    """A model of `system: response` with the preprocessing it was trained with: dialogues in, responses out."""

    def __init__(self, folder: Path, device: str = "") -> None:
        super().__init__(folder, device)
        shape = self.model.config.shape
        self.context = int(shape["turns"]) - 1
        self.reader = still(self.encoder, shape["ground"], shape["frame"])

    def respond(self, dialogues: Sequence[Sequence[Utterance]], **decoding: Any) -> list[str]:
        """Give the response to each dialogue.

        Args:
            dialogues: utterances, the oldest first. A last one without words is who responds, seen before the answer.
            decoding: of `transformers` generation; empty = beam search over five hypotheses. `do_sample=True, top_p=0.9` draws from the
                nucleus, from torch's random stream.

        Raises:
            DataError: a dialogue holds nothing, or features that are not finite.
        """
        return generate(self.backbone, self.encoder, [self.sample(turns, number) for number, turns in enumerate(dialogues)], decoding or DECODING)

    def sample(self, turns: Sequence[Utterance], number: int = 0) -> Sample:
        """Give what is asked of the model for one dialogue.

        Raises:
            DataError: as `respond`; `number` names the dialogue.
        """
        asked = [*turns] if turns and not turns[-1].text else [*turns, Utterance(id="")]
        sample, damaged = self.reader(asked[-self.context - 1 :])
        if damaged or not sample.turns:
            raise DataError(f"dialogue {number + 1}: {'features that are not finite in ' + ', '.join(damaged) if damaged else 'holds no turn to respond to'}")
        return replace(sample, sizes=replace(sample.sizes, id=str(number)))

    def dialogues(self, path: str | Path) -> dict[str, list[Utterance]]:
        """Read a file of dialogues by their names, a turn per line.

        A line is a JSON object with `text`, and optionally `dialogue` (its name) and one of `visual` (frames of face features, as the
        corpus has them, or a .npy file with them), `picture` (a file with a face, where the model sees pictures) and `media` (a film
        whose utterances are turns, instead of a text).

        Raises:
            DataError: a line is no such object, or features are of another width.
        """
        found: dict[str, list[Utterance]] = {}
        for number, row in read_lines(Path(path)):
            try:
                strange = sorted(set(row) - set(ROW))
                if strange:
                    raise ValueError(f"{', '.join(strange)}: unknown; a turn has {', '.join(ROW)}")
                found.setdefault(str(row.get("dialogue", "")), []).extend(self._turns(row, f"{path}:{number}"))
            except (ValueError, TypeError, AttributeError, OverflowError, OSError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
        return found

    @property
    def backbone(self) -> ResponseModel:
        """What responds."""
        return self.model.backbone

    def _turns(self, row: Mapping[str, Any], name: str) -> list[Utterance]:
        if row.get("media"):
            return self.utterances(row["media"])
        raw = isinstance(self.encoder.visual, Pictures)
        if row.get("picture" if not raw else "visual"):
            raise ValueError(
                "visual: the model sees pictures; give picture or media" if raw else "picture: the model sees features of faces; give visual or media"
            )
        given = row.get("visual", [])
        frames = _frames(given)
        item = Utterance(id=str(row.get("id", name)), text=str(row.get("text", "")))
        if row.get("picture"):
            from emoscale.prepare.recorded import read_picture

            return [replace(item, faces=encode_faces(read_picture(Path(row["picture"]), math.isqrt(self.encoder.visual.width // 3))[None]))]
        return [replace(item, visual=frames) if frames.size else item]


def _frames(given: Any) -> np.ndarray:
    """Give fp16 [T, D] of what a turn says of its picture: numbers, or a .npy file."""
    values: Any = read_arrays(given) if isinstance(given, str) else np.asarray(given, np.float32)  # several arrays are refused below
    frames = np.atleast_2d(values)
    if frames.ndim != 2 or frames.dtype.kind not in "fiu":
        raise ValueError(f"visual holds {frames.dtype} of shape {frames.shape}, frames of numbers were expected")
    with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite, and is named then
        return frames.astype(np.float16)


def answers(model: str, files: Sequence[Path], decoding: Sequence[str] = ()) -> list[dict[str, str]]:
    """Give a row `dialogue response` for every dialogue of files, see `Responder.dialogues`.

    Args:
        model: folder or id.
        files: of dialogues.
        decoding: words `key=value` of `transformers` generation.

    Raises:
        ConfigError: the model does not respond, or generation knows no such option.
    """
    responder = load_model(model)
    if not isinstance(responder, Responder):
        raise ConfigError(f"{model}: tells emotions, and responds to nothing; export a run of system response")
    found = [item for path in files for item in responder.dialogues(path).items()]
    try:
        options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(decoding)))
        said = responder.respond([turns for _, turns in found], **options)
    except (ValueError, TypeError, YAMLError) as error:
        raise ConfigError(f"decoding: {' '.join(str(error).split())}") from error
    return [{"dialogue": name, "response": text} for (name, _), text in zip(found, said, strict=True)]


def still(encoder: Encoder, ground: Any, frame: Any) -> TurnReader:
    """Give a reader that draws nothing: where training draws a frame, the middle one is looked at."""
    return TurnReader(encoder, ground=ground, frame="middle" if frame == "drawn" else frame)


@torch.no_grad()
def generate(backbone: ResponseModel, encoder: Encoder, samples: Sequence[Sample], decoding: Mapping[str, Any]) -> list[str]:
    """Give a response for every sample; how long it may be is what the corpus' texts may be, unless `decoding` says."""
    text, found = encoder.text, {}
    given = {"max_new_tokens": text.max_tokens + 1, **decoding}
    for batch, group in _batches(encoder, samples, next(backbone.parameters()).device):
        answers = backbone.respond(batch, **given).tolist()
        found |= {id(sample): text.tokenizer.decode(ids, skip_special_tokens=True) for sample, ids in zip(group, answers, strict=True)}
    return [found[id(sample)] for sample in samples]


@torch.no_grad()
def likelihoods(backbone: ResponseModel, encoder: Encoder, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Give the negative log-likelihood of each response in nats, summed, and its word pieces, the end included."""
    found: dict[int, float] = {}
    for batch, group in _batches(encoder, samples, next(backbone.parameters()).device):
        targets = batch.targets[RESPONSE]
        losses = word_losses(backbone, backbone(batch).answers, targets)
        rows = torch.div(targets.rows, batch.answers.shape[1], rounding_mode="floor")
        sums = losses.new_zeros(len(group)).index_add(0, rows, losses).tolist()
        found |= {id(sample): value for sample, value in zip(group, sums, strict=True)}
    return np.array([found[id(sample)] for sample in samples]), np.array([len(sample.response.ids) - 1 for sample in samples])


def _batches(encoder: Encoder, samples: Sequence[Sample], device: torch.device) -> Iterator[tuple[Any, list[Sample]]]:
    pad = encoder.text.tokenizer.pad_token_id
    for group in within(samples, MAX_TOKENS):
        # Samples keep their identity: what was asked of which is told by it.
        whole = pack_turns([replace(sample, task=RESPONSE) for sample in group], picture_width=encoder.visual.width, classes=encoder.classes, pad=pad)
        yield whole.to(device), group


def score_run(
    run: Path, judge: EmotionModel, *, labels: str = "", label_key: str = "", decoding: Mapping[str, Any] | None = None
) -> tuple[Responses, dict[str, float]]:
    """Generate a response to every held-out turn (`data.held_out` of the run) with the newest checkpoint, and judge it.

    Args:
        run: folder of a pre-training run of `system: response`.
        judge: classifier of emotions in texts, not the one the run was trained with.
        labels: CSV with the emotion of responses; empty = labels of the corpus' own records. Where there is none, what the judge reads.
        label_key: its column, or the key of a record's label.
        decoding: see `Responder.respond`.

    Returns:
        The responses; the perplexity of word frequencies (`unigram`) and of knowing nothing (`uniform`), and how often the judge agrees
        about what was `said`.

    Raises:
        ConfigError: the run is of another system, or its own classifier is the judge.
        DataError: the run held nothing out, or has no checkpoint.
    """
    config = load(RunConfig, run / "config.yaml")
    found = checkpoint.find_latest(run / "checkpoints")
    if config.system != "response":
        raise ConfigError(f"{run}: a run of system {config.system} generates no response; name one of system response")
    if found is None or not config.data.held_out:
        raise DataError(f"{run}: {'has no checkpoint' if found is None else 'held nothing out; pre-train with data.held_out'}")
    train = open_corpora(config.data, config.run.seed).utterances
    held = Held(only_held_out(open_all(config.data), read_held_out(config.data.held_out)), train.manifest)
    encoder = make_encoder(config.data, train, load_tokenizer(str(found / "assets" / "tokenizer"), None))
    # By the shape it has, not by what it started from, which need not be there any more.
    backbone = ResponseModel(**read_json(found / "assets" / "model.json", Options, checkpoint.OLDER)["shape"]).eval()
    weights = checkpoint.load_weights(found)
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")})
    reader = still(encoder, config.turns.ground, config.turns.frame)
    asked = [[held[member] for member in members] for members in _all(Turns(held, config.turns.context))]
    # Turns without words or pictures are answered too: runs that see less must answer the same.
    samples, last = [reader(utterances)[0] for utterances in asked], [utterances[-1] for utterances in asked]
    generated = generate(backbone, encoder, samples, decoding or DECODING)
    nll, pieces = likelihoods(backbone, encoder, samples)
    heard, meant = judged(judge, [item.text for item in last]), judged(judge, generated)
    key = label_key or default_key(labels)
    named = read_labels(labels, held, key)
    truth = [named[item.id][key] if item.id in named else emotion for item, emotion in zip(last, heard, strict=True)]
    table = judge.model.backbone.text.words.weight.detach().double().cpu().numpy()
    ids = [[sample.response.ids[1:-1].tolist() for sample in samples], [encoder.text(text).ids[1:-1].tolist() for text in generated]]
    responses = Responses(
        [item.id for item in last],
        [item.dialogue for item in last],
        [item.text for item in last],
        generated,
        nll,
        pieces,
        similarities(ids[1], ids[0], table),
        np.array([one == other for one, other in zip(meant, truth, strict=True)], np.float64),
    )
    trained = [encoder.text(train[members[-1]].text).ids[1:].tolist() for members in _all(Turns(train, config.turns.context))]
    unigram = unigram_perplexity(trained, [sample.response.ids[1:].tolist() for sample in samples], len(encoder.text.tokenizer))
    return responses, {
        "unigram": unigram,
        "uniform": float(len(encoder.text.tokenizer)),
        "said": float(np.mean([one == other for one, other in zip(heard, truth, strict=True)])),
    }


def judged(judge: EmotionModel, texts: Sequence[str]) -> list[str | None]:
    """Give the emotion that a judge reads in each text; None in an empty one."""
    return [row["emotion"] for row in judge.classify([Utterance(id=str(number), text=text) for number, text in enumerate(texts)])]


def score_arms(arms: Mapping[str, Sequence[Path]], judge: str, **options: Any) -> dict[str, Any]:
    """Score the runs of several arms on the same held-out dialogues; see `score_run` and `evaluation.generation.compare`.

    Raises:
        ConfigError: no judge is named.
    """
    if not judge:
        raise ConfigError("judge: no value given; name a model folder that classifies texts, and that no run was trained with (`emoscale finetune`)")
    bleu_counts([], [])  # what it lacks is said before hours of generation
    model = load_model(judge)
    scored = {name: [score_run(run, model, **options) for run in runs] for name, runs in arms.items()}
    result: dict[str, Any] = {"arms": compare({name: [responses for responses, _ in runs] for name, runs in scored.items()})}
    for name, runs in scored.items():
        result["arms"][name] |= {key: runs[0][1][key] for key in ("unigram", "uniform")}
        shown = runs[0][0]
        result["arms"][name]["samples"] = [
            {"id": shown.ids[row], "said": shown.said[row], "generated": shown.generated[row]} for row in range(min(SAMPLES, len(shown.ids)))
        ]
    first, constants = next(iter(scored.values()))[0]
    return result | {"responses": len(first.ids), "said": constants["said"], "judge": judge}


def _all(turns: Turns) -> Iterator[list[int]]:
    return (turns.at(number) for number in range(len(turns)))
