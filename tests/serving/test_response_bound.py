"""What pictures can add to the BLEU of responses in the demo corpus, for who knows its grammar and its tables.

    python -m pytest -m slow tests/serving/test_response_bound.py -s

Two oracles answer the held-out turns of `configs/finetune/respond-demo.yaml`: one knows what the words before tell, the other also sees the face
of who responds. They decode by beam search, as `emoscale evaluate` does, or say what BLEU rewards most. The corpora of other seeds tell how
much a set of held-out responses varies; nothing is rendered and nothing trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emoscale.evaluation.generation import bleu, bleu_counts
from emoscale.prepare.demo import DemoConfig, films, text
from tests.serving import oracles
from tests.serving.oracles import CLASSES, KNOWN, Rewarded, asked, chances, held_out, likeliest, spoken

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "configs/pretrain/response-held-out.txt"
SETS, DRAWS = 40, 1000

pytestmark = pytest.mark.slow


def test_the_oracles_know_the_grammar() -> None:
    """Sentences drawn by the generator are as likely as the oracle says, word by word."""
    rng, length, drawn = np.random.default_rng(1), 5, 4000
    only = np.eye(len(CLASSES))[0]
    states = oracles._opened({head: room[:, None] * only for head, room in oracles._heads().items()})
    assert sum(float(mass.sum()) for mass in states.values()) == pytest.approx(1)
    firsts = [text.sentence(rng, "anger", text.length(rng), oracles.TOPIC).split() for _ in range(drawn)]
    for place in range(length):
        told = {word: (share, after) for word, share, after in oracles._followed(states)}
        assert sum(share for share, _ in told.values()) == pytest.approx(1)
        for word, (share, _) in told.items():
            count = sum((said + [oracles.END] * 9)[place] == word for said in firsts)
            assert abs(count - share * len(firsts)) < 5 * np.sqrt(len(firsts) * share * (1 - share)) + 1, word
        common = max(told, key=lambda word: told[word][0])
        firsts, states = [said for said in firsts if (said + [oracles.END] * 9)[place] == common], oracles._opened(told[common][1])


def test_the_oracles_know_the_tables() -> None:
    """What they expect of a response is what the corpora of other seeds hold."""
    items = [item for seed in range(100, 106) for item in asked(seed, DemoConfig(pretrain_films=80, labelled_films=0))]
    for name, parts in KNOWN.items():
        for known, (_, classes) in chances(name).items():
            found = [item.said for item in items if tuple(item.known[part] for part in parts) == known]
            if len(found) < 100:
                continue
            own = [sum(word in said.split() for said in found) for word in ("anger", "happy", "sad")]
            wanted = [0.95 * classes[CLASSES.index(word)] * text.WEIGHTS[0] * len(found) for word in ("anger", "happy", "sad")]
            assert np.all(np.abs(np.array(own) - wanted) < 5 * np.sqrt(np.array(wanted)) + 4), known


def test_beam_search_gains_nothing_by_pictures_that_bleu_would_reward() -> None:
    rewarded = Rewarded(60_000)
    decoded = {
        "beam search": {name: {known: likeliest(classes) for known, (_, classes) in chances(name).items()} for name in KNOWN},
        "what BLEU rewards": {name: rewarded.best(name) for name in KNOWN},
    }  # fmt: skip
    real = asked(0, DemoConfig(), held_out(HELD_OUT))
    assert len(real) == 349
    corpora = [
        asked(1000 + number, DemoConfig(pretrain_films=0), {cast.name for cast in films(DemoConfig(pretrain_films=0))[:20]})[: len(real)]
        for number in range(SETS)
    ]
    names, owner = np.unique([item.dialogue for item in real], return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)[:, owner]
    gains = {}
    for decoding, sentences in decoded.items():
        counts = {name: bleu_counts(spoken(name, sentences[name], real), [item.said for item in real]) for name in KNOWN}
        other = {
            name: np.array([bleu(bleu_counts(spoken(name, sentences[name], items), [item.said for item in items]).sum(0)) for items in corpora])
            for name in KNOWN
        }
        for name in KNOWN:
            print(
                f"\n{decoding}, knows {name}: BLEU {bleu(counts[name].sum(0)):.2f}, {counts[name].sum(0)[3]:.0f} runs of four words match; in {SETS} other corpora {other[name].mean():.2f} ± {other[name].std():.2f}",
                end="",
            )
        for name in ("picture", "emotion"):
            more = np.array([bleu(row) for row in draws @ counts[name]]) - np.array([bleu(row) for row in draws @ counts["words"]])
            own, (low, high) = bleu(counts[name].sum(0)) - bleu(counts["words"].sum(0)), np.quantile(more, [0.025, 0.975])
            gain = other[name] - other["words"]
            gains[decoding, name] = gain
            print(
                f"\n  {name} adds {own:.2f} ({low:.2f} … {high:.2f}); there {gain.mean():.2f} ± {gain.std():.2f} per corpus, above 0 in {100 * np.mean(gain > 0):.0f} %",
                end="",
            )
    few = gains["beam search", "picture"]
    assert few.mean() < 2 * few.std() / np.sqrt(SETS), "beam search turns what a face tells into BLEU: compare the models again"
    assert gains["what BLEU rewards", "picture"].mean() > 2 * gains["what BLEU rewards", "picture"].std() / np.sqrt(SETS)
