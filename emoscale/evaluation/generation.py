"""How good generated responses are: what was said again, how varied, how alike in meaning, and with what emotion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoscale.config import DataError

ORDER = 4
"""Of the longest n-grams of BLEU."""
RESAMPLES = 1000


@dataclass
class Responses:
    """What one run generated for responses of a corpus, beside what was said."""

    ids: list[str]
    """Of the responses that were said."""
    dialogues: list[str]
    """Of each."""
    said: list[str]
    generated: list[str]
    nll: NDArray[np.float64]
    """Negative log-likelihood of the word pieces that were said, nats, summed over each response."""
    pieces: NDArray[np.int64]
    """Word pieces of each, its end included."""
    similarity: NDArray[np.float64]
    """Of the vectors of both, see `similarities`."""
    agrees: NDArray[np.float64]
    """1 where the judge reads the emotion of the response in what was generated, else 0."""


def bleu_counts(generated: Sequence[str], said: Sequence[str]) -> NDArray[np.float64]:
    """Give float64 [n, 10]: of each response the matching n-grams of orders 1 … 4, all of them, and the lengths of both.

    Raises:
        ImportError: sacrebleu is missing; says how to install it.
    """
    bleu = _sacrebleu()(effective_order=True)
    scores = [bleu.sentence_score(one, [other]) for one, other in zip(generated, said, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], np.float64).reshape(-1, 2 * ORDER + 2)


def bleu(counts: NDArray[np.float64]) -> float:
    """Give the BLEU of a corpus, in percent, from the sum of its rows of `bleu_counts`.

    Source: Papineni et al. 2002; as sacrebleu computes it (13a tokens, `exp` smoothing).
    """
    matching, total = counts[:ORDER].tolist(), counts[ORDER : 2 * ORDER].tolist()
    return float(_sacrebleu().compute_bleu(matching, total, int(counts[-2]), int(counts[-1]), smooth_method="exp").score)


def distinct(texts: Sequence[str], order: int) -> float:
    """Give how many different n-grams there are for each n-gram of all texts together; 0 where there is none.

    Source: Li et al. 2016 (arXiv:1510.03055), Dist-1 and Dist-2.
    """
    words = [text.split() for text in texts]
    found = [tuple(line[place : place + order]) for line in words for place in range(len(line) - order + 1)]
    return len(set(found)) / len(found) if found else 0.0


def similarities(generated: Sequence[Sequence[int]], said: Sequence[Sequence[int]], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give float64 [n]: the cosine of the mean word vectors of two texts, 0 where one has no word.

    Args:
        generated, said: word pieces.
        table: [c, d], a vector per word piece.

    Source: Liu et al. 2016 (arXiv:1603.08023), embedding average.
    """
    pairs = zip(generated, said, strict=True)
    return np.array([_cosine(table[list(one)].mean(0), table[list(other)].mean(0)) if one and other else 0.0 for one, other in pairs])


def unigram_perplexity(trained: Sequence[Sequence[int]], said: Sequence[Sequence[int]], vocabulary: int) -> float:
    """Give the perplexity of word pieces under their frequencies (add-one) in the responses that were trained on."""
    counts = np.ones(vocabulary)
    for pieces in trained:
        np.add.at(counts, list(pieces), 1)
    chances = np.log(counts / counts.sum())
    flat = np.concatenate([np.asarray(pieces, np.int64) for pieces in said])
    return float(np.exp(-chances[flat].mean()))


def compare(arms: Mapping[str, Sequence[Responses]], *, seed: int = 0) -> dict[str, Any]:
    """Give per arm the mean over its runs of every measure, its 95 % interval, and its difference from the first arm.

    Dialogues are drawn, the same for all arms and runs.

    Args:
        arms: name → the runs of its seeds, all over the same responses.
        seed: of the draws.

    Returns:
        Per arm: `perplexity`, `bleu` (percent), `similarity`, `emotion_consistency`, each with `value low high`, and behind the first arm
        `difference`, alike (the first arm less this one); `dist_1`, `dist_2`, `runs`.

    Raises:
        DataError: the arms do not answer the same, or all in one dialogue.
    """
    every = [run for runs in arms.values() for run in runs]
    if any(run.ids != every[0].ids for run in every):
        raise DataError("the runs answer different turns; score runs that held out the same utterances and read as many turns (turns.context)")
    names, owner = np.unique(every[0].dialogues, return_inverse=True)
    if len(names) < 2:
        raise DataError("held-out responses come from one dialogue; an interval needs at least two")
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(owner))), draws[:, owner]], dtype=np.float64)
    scored = {name: np.mean([_measures(run, weights) for run in runs], axis=0) for name, runs in arms.items()}
    first = next(iter(scored))
    found: dict[str, Any] = {}
    for name, table in scored.items():
        rows = {measure: _interval(table[row]) for row, measure in enumerate(MEASURES)}
        if name != first:
            rows = {measure: own | {"difference": _interval(scored[first][row] - table[row])} for row, (measure, own) in enumerate(rows.items())}
        varied = {f"dist_{order}": float(np.mean([distinct(run.generated, order) for run in arms[name]])) for order in (1, 2)}
        found[name] = rows | varied | {"runs": len(arms[name])}
    return found


MEASURES = ("perplexity", "bleu", "similarity", "emotion_consistency")


def _measures(run: Responses, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give float64 [measures, draws]."""
    counts = weights @ bleu_counts(run.generated, run.said)
    total = weights.sum(1)
    perplexity = np.exp((weights @ run.nll) / (weights @ run.pieces))
    return np.stack([perplexity, np.array([bleu(row) for row in counts]), weights @ run.similarity / total, weights @ run.agrees / total])


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else 0.0


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU  # pyright: ignore[reportPrivateImportUsage]  # public in its readme
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'emoscale[generation]'") from error
    return BLEU
