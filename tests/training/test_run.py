"""Runs that are killed, signalled, moved and changed, through the command line in processes of their own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
from tests.corpora import add_to_corpus, write_corpus
from tests.training.runs import BETWEEN, RECIPE, STEPS, Runs, assert_same_run, ended, rows, wait_for_checkpoint, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
LAST = f"step_{STEPS:08d}"
FIRST_STEP = 2.0
"""Processor time from a command to its first optimizer step, of that of importing PyTorch and Transformers alone."""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("words", "workers", "world"), [
    (["zero.stage=1"], 0, 1),
    (["zero.stage=1"], 2, 1),
    (["zero.stage=0"], 0, 1),
    (["zero.stage=2"], 0, 1),
    (["zero.stage=3"], 0, 1),
    (["zero.stage=1", "run.precision=bf16"], 2, 1),
    (["zero.stage=1"], 2, 2),
    (["zero.stage=3"], 0, 2),
])  # fmt: skip
def test_a_killed_run_goes_on_bit_equal(runs: Runs, tmp_path: Path, words: list[str], workers: int, world: int):
    folder, words_with = tmp_path / "run", [*words, f"data.workers={workers}"]
    ranks = runs.start(folder, *words_with, world=world, pace=BETWEEN)
    wait_for_checkpoint(folder, 5, ranks)
    wait_for_step(folder, 7, ranks)
    ranks.kill(signal.SIGKILL)
    assert ranks.wait() == [-9] * world
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000005"
    assert not (folder / "done.json").exists()
    runs.start(folder, *words_with, world=world).succeed()
    assert "goes on from step_00000005" in (folder / "train.log").read_text()
    assert ended(folder)["finished"]
    assert_same_run(folder, runs.unbroken(*words, world=world))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("number", "world", "rank", "group"), [
    (signal.SIGUSR1, 1, None, False),
    (signal.SIGTERM, 1, None, True),
    (signal.SIGUSR1, 1, None, True),
    (signal.SIGUSR1, 2, 1, False),
    (signal.SIGTERM, 2, 0, False),
])  # fmt: skip
def test_a_signal_saves_and_the_run_goes_on_bit_equal(runs: Runs, tmp_path: Path, number: signal.Signals, world: int, rank: int | None, group: bool):
    """To the process, to all processes of the job as SLURM does (the workers that read ahead too), or to one rank of two."""
    folder, words = tmp_path / "run", ["zero.stage=1", "data.workers=2"]
    ranks = runs.start(folder, *words, world=world, pace=BETWEEN)
    wait_for_step(folder, 2, ranks)
    ranks.kill(number, rank=rank, group=group)
    ranks.succeed()
    stopped = ended(folder)
    assert not stopped["finished"]
    assert stopped["reason"] == number.name, "told by whichever rank heard it"
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{stopped['step']:08d}"
    assert rows(folder)[-1]["step"] == stopped["step"] < STEPS
    runs.start(folder, *words, world=world).succeed()
    assert_same_run(folder, runs.unbroken("zero.stage=1", world=world))


def test_a_run_folder_tells_all(runs: Runs):
    folder = runs.unbroken("zero.stage=1")
    assert {path.name for path in folder.iterdir()} == {
        "assets",
        "checkpoints",
        "config.json",
        "config.yaml",
        "deepspeed.json",
        "done.json",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "startup.json",
        "train.log",
    }
    startup = json.loads((folder / "startup.json").read_text())
    assert startup["step"] == 1
    assert startup["first_step_s"] == pytest.approx(sum(startup[f"{name}_s"] for name in ("imports", "folder", "corpus", "model", "step")), abs=0.01)
    assert f"first step after {startup['first_step_s']:.1f} s (imports " in (folder / "train.log").read_text()
    assert json.loads((folder / "deepspeed.json").read_text())["gradient_clipping"] == 5.0
    row = rows(folder)[-1]
    assert {"step", "loss", "lr", "grad_norm", "utterances", "tokens", "loss/masked_text", "loss/visual_emotion"} <= set(row)
    assert row["utterances"] == 64
    assert row["loss"] == pytest.approx(sum(value for name, value in row.items() if name.startswith("loss/")))


def test_the_last_checkpoint_holds_what_a_model_needs(runs: Runs):
    folder = runs.unbroken("zero.stage=1") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000005", LAST]
    assert {path.name for path in (folder / LAST / "assets").iterdir()} == {"corpus.json", "model.json", "tokenizer"}


@pytest.mark.faults
def test_a_damaged_checkpoint_is_passed_over(runs: Runs):
    folder = runs.copy("zero.stage=1")
    weights = folder / "checkpoints" / LAST / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folder / "checkpoints" / ".step_00000007.writing").mkdir()
    shown = runs.start(folder, "zero.stage=1").succeed()
    assert "checkpoint passed over" in shown
    assert f"{LAST}/weights.safetensors: damaged" in shown
    assert not (folder / "checkpoints" / ".step_00000007.writing").exists()
    assert_same_run(folder, runs.unbroken("zero.stage=1"))


@pytest.mark.faults
def test_no_whole_checkpoint_is_an_error(runs: Runs):
    folder = runs.copy("zero.stage=1")
    for path in (folder / "checkpoints").glob("step_*/state.json"):
        path.unlink()
    ranks = runs.start(folder, "zero.stage=1")
    assert ranks.wait() == [1]
    assert "none of 2 checkpoints is whole" in ranks.output()
    assert "Traceback" not in ranks.output()


def test_another_configuration_is_refused_with_its_differences(runs: Runs):
    folder = runs.copy("zero.stage=1")
    before = (folder / "config.json").read_text()
    ranks = runs.start(folder, "zero.stage=1", "optim.lr=0.5", "model.dropout=0.3")
    assert ranks.wait() == [2]
    assert "model.dropout: 0.1 → 0.3; optim.lr: 0.001 → 0.5" in ranks.output()
    assert (folder / "config.json").read_text() == before


def test_what_does_not_change_the_result_may_change(runs: Runs, tmp_path: Path):
    """The corpus has moved, the stage and the micro-batches are others: the end is the same up to rounding."""
    folder = runs.copy("zero.stage=1", "model.dropout=0")
    shutil.rmtree(folder / "checkpoints" / LAST)
    moved = shutil.copytree(runs.corpus, tmp_path / "moved")
    words = ["model.dropout=0", "zero.stage=2", "data.max_tokens=512", "data.workers=1", "run.keep=1", "run.save_every=4"]
    runs.start(folder, *words, corpus=moved).succeed()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", LAST]
    mine, wanted = (load_file(run / "checkpoints" / LAST / "weights.safetensors") for run in (folder, runs.unbroken("zero.stage=1", "model.dropout=0")))
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


def test_another_corpus_is_refused(runs: Runs, tmp_path: Path):
    folder = runs.copy("zero.stage=1")
    source = Synthetic(8, visual_width=7, acoustic_width=5, expressions=0)
    ranks = runs.start(folder, "zero.stage=1", corpus=write_corpus(tmp_path / "other", source))
    assert ranks.wait() == [1]
    assert "other: its first 40 utterances are not those that the run has seen (utterances: 40 → 8)" in ranks.output()


def test_a_run_goes_on_with_a_corpus_that_has_grown(runs: Runs, tmp_path: Path):
    folder, corpus = runs.copy("zero.stage=1"), Path(shutil.copytree(runs.corpus, tmp_path / "grown"))
    before, count = rows(folder), json.loads((corpus / "manifest.json").read_text())["counts"]["utterances"]
    shutil.rmtree(folder / "checkpoints" / LAST)
    add_to_corpus(corpus, Synthetic(count + 24, visual_width=6, acoustic_width=5, expressions=3))
    assert f"corpora have grown: [{count}] → [{count + 24}] utterances" in runs.start(folder, "zero.stage=1", corpus=corpus).succeed()
    state = json.loads((folder / "checkpoints" / LAST / "state.json").read_text())
    assert [(stage["place"], stage["counts"]) for stage in state["corpora"]] == [(0, [count]), (5 * 64, [count + 24])]
    # 320 places are eight passes of 40: the next step begins with all 64.
    assert rows(folder)[:5] == before[:5]
    assert rows(folder)[5] != before[5]
    assert runs.start(tmp_path / "share", "data.fraction=0.5", "run.steps=2").wait() == [0]
    ranks = runs.start(tmp_path / "share", "data.fraction=0.5", "run.steps=2", corpus=corpus)
    assert ranks.wait() == [1]
    assert "would choose anew from all of it" in ranks.output()


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
def test_data_that_cannot_be_read_costs_nothing_that_was_learned(runs: Runs, tmp_path: Path, world: int):
    """A shard is damaged: all ranks save, say which shard, and end; when it is mended the run goes on bit for bit."""
    corpus = write_corpus(tmp_path / "corpus", Synthetic(320, visual_width=6, acoustic_width=5, expressions=0), shard_bytes=1 << 15)
    folder, words = tmp_path / "run", ["data.block=16", f"data.workers={2 - world}"]
    order = Order(320, 1234, 16)
    seen = [shard_of(corpus, order.at(place)[1]) for place in range(3 * 64)]
    later = next(number for number in seen if number not in seen[:64])
    shard = sorted(corpus.glob("*.mds"))[later]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ranks = runs.start(folder, *words, world=world, corpus=corpus)
    assert set(ranks.wait()) == {1}
    assert f"{shard.name}: shard is damaged" in ranks.output()
    assert "Traceback" not in ranks.output()
    step = seen.index(later) // 64
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{step:08d}"
    shard.write_bytes(content)
    runs.start(folder, *words, world=world, corpus=corpus).succeed()
    runs.start(tmp_path / "unbroken", *words, world=world, corpus=corpus).succeed()
    assert_same_run(folder, tmp_path / "unbroken")


def shard_of(corpus: Path, number: int) -> int:
    """Give the shard that holds an utterance."""
    counts = [shard["samples"] for shard in json.loads((corpus / "index.json").read_text())["shards"]]
    return next(i for i in range(len(counts)) if number < sum(counts[: i + 1]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_learning_rates_by_name_hold_in_every_stage(runs: Runs, tmp_path: Path, stage: int):
    words = [f"zero.stage={stage}", "run.steps=1", "optim.name=sgd", "optim.weight_decay=0", "optim.clip=0", "model.dropout=0"]
    found = {}
    for name, factors in {"plain": "{}", "halved": "{backbone.text: 0.5}"}.items():
        runs.start(tmp_path / name, *words, f"optim.factors={factors}").succeed()
        found[name] = load_file(tmp_path / name / "checkpoints" / "step_00000001" / "weights.safetensors")
    runs.start(tmp_path / "start", *words, "optim.lr=1e-30").succeed()
    start = load_file(tmp_path / "start" / "checkpoints" / "step_00000001" / "weights.safetensors")
    for name, value in start.items():
        moved = {key: weights[name] - value for key, weights in found.items()}
        torch.testing.assert_close(moved["halved"], moved["plain"] * (0.5 if name.startswith("backbone.text") else 1.0), rtol=1e-3, atol=1e-7)


def test_check_writes_nothing(runs: Runs, tmp_path: Path):
    words = ["pretrain", "--check", f"data.corpora=[{runs.corpus}]", f"run.output={tmp_path / 'run'}", *RECIPE]
    assert "# valid" in runs.forks.start("tests.training.runs:command", *words).succeed()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("word", "message"), [
    ("data.corpora=[/absent]", "data.corpora: /absent does not exist"),
    ("zero.stage=7", "zero.stage: 7"),
    ("zero.stage=0 run.precision=bf16", "zero.stage: bf16"),
    ("objectives.masked_txt={}", "did you mean 'masked_text'"),
    ("data.only=none/", "no utterance is left; ids look like"),
    ("run.signal=NOSUCH", "run.signal: 'NOSUCH' is no signal"),
    ("model.freeze=[layers.0]", "model.freeze: no parameter begins with 'layers.0'"),
])  # fmt: skip
def test_what_cannot_run_says_so_in_one_line(runs: Runs, tmp_path: Path, word: str, message: str):
    ranks = runs.start(tmp_path / "run", *word.split())
    assert ranks.wait()[0] in (1, 2)
    assert message in ranks.output()
    assert "Traceback" not in ranks.output()


def test_a_start_imports_nothing_that_it_does_not_need(corpus: Path, tmp_path: Path):
    """Scikit-learn, torchvision and Inductor came along with a tokenizer, a shard reader and an optimizer; they are half of a start."""
    code = """
import sys
from emoscale.cli import main
try:
    main()
finally:
    print("LOADED", [name for name in ("sklearn", "torchvision", "torch._inductor.compile_fx", "transformers.generation", "botocore") if name in sys.modules])
"""
    words = [f"data.corpora=[{corpus}]", *RECIPE, "run.steps=1", "data.only=synthetic"]
    # Processor time beside that of the imports nobody can leave out, so that neither a slow machine nor a busy one fails it; 1.0 where it was measured.
    bare = "import time, torch, transformers, deepspeed; transformers.BertModel; print(time.process_time())"
    least = min(float(subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(2))
    spent: list[float] = []
    for name in ("first", "second"):
        done = subprocess.run([sys.executable, "-c", code, "pretrain", *words, f"run.output={tmp_path / name}"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "LOADED []" in done.stdout
        spent.append(json.loads((tmp_path / name / "startup.json").read_text())["cpu_s"])
    assert min(spent) < FIRST_STEP * least
