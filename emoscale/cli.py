"""The command line: one short function per command.

Exit codes: 0 done · 1 failure · 2 usage (a command, option or configuration that cannot be run).
Nothing heavy is imported before the command that needs it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [key=value]...", help="A configuration file, and what differs from it."),
]
Check = Annotated[bool, typer.Option("--check", help="Validate everything, touch nothing, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr.")]

app = typer.Typer(
    name="emoscale",
    help="Pre-train multimodal emotion models on unlabelled video, and turn them into emotion applications.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")] = False,
) -> None:
    """Pre-train multimodal emotion models on unlabelled video, and turn them into emotion applications."""
    if version:
        from emoscale import __version__

        print(f"emoscale {__version__}")
        raise typer.Exit


@app.command(epilog="Example: `emoscale doctor runs/memobert-demo/checkpoints/step_00000200`")
def doctor(
    target: Annotated[Path | None, typer.Argument(help="A run, a checkpoint or a corpus whose hashes to verify.")] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Free shared memory that killed runs left behind.")] = False,
    json: Json = False,
) -> None:
    """Say what this machine can run, what it lacks and the remedy; or verify a run, a checkpoint or a corpus."""
    from emoscale import doctor as room

    findings = room.clean() if clean else room.verify(target) if target else room.examine()
    _show([vars(item) for item in findings], json, "\n".join(map(str, findings)))
    raise typer.Exit(0 if all(item.ok or not item.needed for item in findings) else 1)


@app.command(epilog="Example: `emoscale prepare configs/prepare/demo.yaml output=corpora/demo`")
def prepare(
    words: Words = None,
    check: Check = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard of `output` with its hash.")] = False,
    json: Json = False,
) -> None:
    """Turn films with subtitles, or a manifest of features, into a corpus; resumes what was begun."""
    from emoscale.prepare import pipeline, shards

    config = _read(pipeline.PrepareConfig, words)
    if check:
        return _valid(config, json)
    if verify:
        manifest = shards.verify(Path(config.output))
        return _show(manifest["counts"], json, f"{config.output}: {len(manifest['shards'])} shards match their hashes")
    _announce(config.output, json)
    try:
        summary = pipeline.prepare(config, _progress(json))
    except pipeline.SkippedInputsError as error:
        _show(vars(error.summary), json, error.summary.table())
        raise
    return _show(vars(summary), json, summary.table())


@app.command(epilog="Example: `emoscale pretrain configs/pretrain/memobert-demo.yaml optim.lr=3e-4`")
def pretrain(words: Words = None, check: Check = False, json: Json = False) -> None:
    """Pre-train on a prepared corpus; resumes the run in its output folder if there is one."""
    from emoscale import distributed
    from emoscale.training import corpora, run

    config = _read(run.RunConfig, words)
    if check:
        run.check(config)
        distributed.shutdown()
        return _valid(config, json)
    _announce(config.run.output, json)
    checkpoint = run.pretrain(config)
    if _is_main():
        _write_report(Path(config.run.output), corpora.folders_of(config.data), json)
    distributed.shutdown()  # NCCL complains where a process ends without
    return _show({"checkpoint": str(checkpoint)}, json, f"checkpoint: {checkpoint}")


@app.command(epilog="Example: `emoscale launch nodes=4 gpus=8 cpus=8 configs/pretrain/memobert.yaml data.corpora='[corpora/films]' run.output=runs/memobert`")
def launch(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[nodes=… gpus=… tasks=… cpus=… time=… partition=…]... CONFIG.yaml [key=value]...", help="What SLURM is asked for, and what `pretrain` is."
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the job, do not print its command.")] = False,
) -> None:
    """Check a pre-training's configuration, and print or submit the `sbatch` command that runs it on a cluster."""
    from emoscale.training.launch import launch as command

    _say(command(list(words or []), submit=submit))


@app.command(epilog="Example: `emoscale finetune configs/finetune/demo.yaml init=runs/memobert-demo head.name=prompt`")
def finetune(words: Words = None, check: Check = False, json: Json = False) -> None:
    """Train an emotion classifier on a labelled corpus, over folds of speakers and seeds; or a `system` whole, in the loop of `pretrain`."""
    from emoscale.config import named

    if "system" in named(*_file_and_words(words)):
        return pretrain(words, check, json)
    from emoscale import distributed
    from emoscale.training import finetune as stage

    config = _read(stage.FinetuneConfig, words)
    if check:
        stage.check(config)
        return _valid(config, json)
    _announce(config.output, json)
    folder = stage.finetune(config)
    distributed.shutdown()  # see `pretrain`
    if not config.gather:
        return _say(f"outcomes: {folder / 'outcomes'}")
    return _show(_load_json(folder / "results.json"), json, f"results: {folder / 'results.json'}")


@app.command(epilog="Example: `emoscale evaluate model=runs/memobert-demo/finetune/model corpus=corpora/demo`")
def evaluate(words: Words = None, json: Json = False) -> None:
    """Score a fine-tuned model on a labelled corpus: WA, UAR, WF1, confusion matrix, 95 % intervals."""
    from emoscale.serving import evaluate as stage

    config = _read(stage.EvaluateConfig, words)
    scores = stage.evaluate(config)
    _show(scores, json, "\n".join(_lines(scores)))


@app.command(
    epilog="Example: `emoscale predict talk.mp4 --model runs/memobert-demo/finetune/model --json`; "
    "to respond, `emoscale predict dialogue.jsonl --respond --model models/respond`"
)
def predict(
    media: Annotated[list[Path], typer.Argument(help="Films to judge; subtitles beside them are used.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hugging Face id of a fine-tuned model.")],
    respond: Annotated[bool, typer.Option("--respond", help="The files hold dialogues, a turn per line of JSON; generate the response to each.")] = False,
    decoding: Annotated[str, typer.Option(help="How a response is generated, such as `do_sample=true top_p=0.9`; else beam search.")] = "",
    json: Json = False,
) -> None:
    """Say the emotion of every utterance of a film, with the preprocessing the model was trained with; or respond to dialogues."""
    import emoscale
    from emoscale.config import DataError

    if respond:
        from emoscale.serving.respond import answers

        rows = answers(model, media, decoding.split())
        return _show(rows, json, "\n".join("\t".join(map(str, row.values())) for row in rows))
    loaded, rows, failed = emoscale.load(model), [], []
    for path in media:
        try:
            rows += [row | {"media": str(path)} for row in loaded.predict(path)]
        except DataError as error:  # the other films are judged all the same
            if len(media) == 1:
                raise
            failed.append(str(error))
            _say(f"emoscale: {error}", aside=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_short(row.get(name, "")) for name in names] for row in rows)]
    _show(rows, json, "\n".join("\t".join(line) for line in lines))
    if failed:
        raise DataError(f"{len(failed)} of {len(media)} films could not be judged")


@app.command(epilog="Example: `emoscale export runs/memobert-demo/checkpoints/step_00000200 models/memobert-demo`")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its latest.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, such as for a hub.")],
    encoders: Annotated[bool, typer.Option("--encoders", help="Write the encoders within it instead, each as a folder of plain transformers.")] = False,
) -> None:
    """Write a checkpoint as a safetensors folder that `AutoModel.from_pretrained` opens."""
    _announce(out)
    if encoders:
        from emoscale.training.stock import export_encoders

        typer.echo("\n".join(f"{out / name}" for name in export_encoders(checkpoint, out)))
        return
    from emoscale.training.export import export as write

    write(checkpoint, out)


@app.command(epilog="Example: `emoscale bench step`")
def bench(
    what: Annotated[
        str,
        typer.Argument(help="step, dialogues, data, kernels, prepare, probe, scale, check (whether a ratio has fallen), or gpu for step and kernels on a GPU."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    json: Json = False,
) -> None:
    """Measure a training step, dialogues, the loader or the kernels against their peers, `prepare` by stage, a probe over folds and seeds, or predict steps on up to 1,024 GPUs (`scale`)."""
    from emoscale.training.bench import BENCHES, TOLD

    if what not in BENCHES:
        raise typer.BadParameter(f"{what!r} is none of {', '.join(BENCHES)}")
    result = BENCHES[what](overrides or [])
    _show(result, json, TOLD[what](result) if what in TOLD else "\n".join(f"{name:<32} {_short(value)}" for name, value in result.items()))


@app.command(epilog="Example: `emoscale config pretrain optim.lr`")
def config(
    stage: Annotated[str, typer.Argument(help="pretrain, finetune, prepare, evaluate or launch.")] = "pretrain",
    key: Annotated[str, typer.Argument(help="One key, or the beginning of several.")] = "",
    json: Json = False,
) -> None:
    """List every configuration key with its type, default and meaning."""
    from emoscale.config import ConfigError, describe

    rows = [row for row in (*describe(schema(stage)), *_registered(stage)) if row[0].startswith(key)]
    if not rows:
        raise ConfigError(f"{key}: unknown key of {stage}; `emoscale config {stage}` lists every key")
    records = [dict(zip(("key", "type", "default", "meaning"), row, strict=True)) for row in rows]
    _show(records, json, "\n".join(f"{name}: {kind} = {default}\n    {doc}" for name, kind, default, doc in rows))


def schema(stage: str) -> type:
    """Give the configuration dataclass of a stage; `configs/<stage>/*.yaml` are read with it."""
    if stage == "prepare":
        from emoscale.prepare.pipeline import PrepareConfig as Schema
    elif stage == "pretrain":
        from emoscale.training.run import RunConfig as Schema
    elif stage == "finetune":
        from emoscale.training.finetune import FinetuneConfig as Schema
    elif stage == "evaluate":
        from emoscale.serving.evaluate import EvaluateConfig as Schema
    elif stage == "launch":
        from emoscale.training.launch import LaunchConfig as Schema
    else:
        raise typer.BadParameter(f"{stage!r} is none of pretrain, finetune, prepare, evaluate, launch")
    return Schema


def _registered(stage: str) -> list[tuple[str, str, str, str]]:
    """List what each objective (pretrain) and each head (finetune) takes, as `config.describe` does."""
    from emoscale.config import describe

    if stage == "pretrain":
        from emoscale.objectives import DIALOGUE_OBJECTIVES, OBJECTIVES, RESPONSE_OBJECTIVES
        from emoscale.objectives.image_text import PAIR_OBJECTIVES

        kinds = OBJECTIVES | DIALOGUE_OBJECTIVES | PAIR_OBJECTIVES | RESPONSE_OBJECTIVES
        return [row for name, kind in kinds.items() for row in describe(kind.Config, f"objectives.{name}.")]
    if stage == "finetune":
        from emoscale.heads import HEADS

        return [(f"{row[0]} ({name})", *row[1:]) for name, kind in HEADS.items() for row in describe(kind.Config, "head.")]
    return []


def _read(schema: type[T], words: list[str] | None) -> T:
    from emoscale.config import load

    return load(schema, *_file_and_words(words))


def _file_and_words(words: list[str] | None) -> tuple[str | None, list[str]]:
    """Take the first word as a file where it is no `key=value`, the others as overrides."""
    words = list(words or [])
    return words.pop(0) if words and "=" not in words[0] else None, words


def _is_main() -> bool:
    from emoscale.distributed import world_from

    return world_from(os.environ).is_main


def _say(line: str, aside: bool = False) -> None:
    if _is_main():
        print(line, file=sys.stderr if aside else sys.stdout, flush=True)


def _announce(folder: str | Path, aside: bool = False) -> None:
    _say(f"output: {folder}", aside)


def _valid(config: Any, json: bool) -> None:
    from emoscale.config import to_dict, to_yaml

    _show(to_dict(config), json, f"{to_yaml(config)}# valid")


def _show(value: Any, json: bool, text: str) -> None:
    """Print a result for a machine or for a person."""
    if json:
        import json as module

        text = module.dumps(value, indent=2, default=str, ensure_ascii=False)
    _say(text)


def _write_report(folder: Path, corpora: list[Path], aside: bool) -> None:
    """Write what a pre-training run leaves to be looked at: curves, corpora, environment."""
    from emoscale.evaluation import report

    command = f"emoscale pretrain {folder / 'config.yaml'}"
    sections = [report.curves_section({folder.name: folder}, command=command)]
    sections += [report.corpus_section(corpus, command=f"emoscale prepare output={corpus}") for corpus in corpora]
    sections.append(report.environment_section(folder, command=command))
    report.write_report(folder / "report.html", title=f"Pre-training: {folder.name}", sections=sections)
    _say(f"report: {folder / 'report.html'}", aside)


def _load_json(path: Path) -> Any:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(values: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """Lay scores out, a line each; what holds tables of its own comes before them, which are indented."""
    for name, value in values.items():
        head = f"{'  ' * depth}{name:<16}"
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else []
        if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
            yield head.rstrip()
            yield from _lines(value, depth + 1)
        elif rows:
            yield head.rstrip()
            yield from (f"{'  ' * (depth + 1)}{_short(row)}" for row in rows)
        else:
            yield f"{head} {_short(value)}"


def _progress(aside: bool) -> Callable[[int, int, dict[str, Any]], None]:
    """Give what shows the progress of `prepare`: one line that renews itself on a terminal, plain lines in a log."""
    stream = sys.stderr if aside else sys.stdout
    start, end = ("\r\x1b[2K", "") if stream.isatty() else ("", "\n")

    def report(done: int, of: int, row: dict[str, Any]) -> None:
        state = row["reason"] or f"{row['utterances']} utterances"
        last = "\n" if done == of else end
        print(f"{start}[{done}/{of}] {row['path']}: {state}", end=last, file=stream, flush=True)

    return report


def main() -> None:
    """Run a command; an error that the user can mend is one line."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app(prog_name="emoscale")
    except Exception as error:
        import traceback

        from emoscale.redaction import redact

        status = _status(error)
        whole = debug or status is None  # errors of other libraries show what they were given, so that too is shown without credentials
        told = "".join(traceback.format_exception(error)) if whole else f"emoscale: {' '.join(str(error).split())}\n"
        print(redact(told), end="", file=sys.stderr)
        sys.exit(1 if status is None else status)


def _status(error: Exception) -> int | None:
    """Give the exit code of an error whose message suffices, None for one that only its traceback explains."""
    from emoscale.config import EmoscaleError

    if isinstance(error, EmoscaleError):
        return error.status
    missing_extra = isinstance(error, ImportError) and "pip install" in str(error)
    return 1 if missing_extra or isinstance(error, OSError) else None
