"""What a run folder and a corpus folder tell a report: metrics, environment, manifest and ledger."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from emoscale.config import DataError
from emoscale.evaluation.charts import legend, line_chart, number
from emoscale.evaluation.page import Section, cell, table
from emoscale.files import file_sha256, parse_json
from emoscale.forms import Manifest, Row
from emoscale.records import check, read_json, read_lines

FIRST_CURVES = ("loss", "uar", "validation", "valid", "eval", "wa")
LAST_CURVES = ("lr", "grad_norm", "utterances_per_s", "data_wait_share", "mfu", "memory_gib")
LARGEST = 1e300
"""Beyond it nothing can be drawn."""
NO_CURVES = {"step", "utterances", "tokens", "step_time_s", "data_wait_s", "time", "pass", "epoch"}


def load_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a run in the order written.

    A run that was killed may leave a torn line: at the end it is dropped; in the middle, where a resumed run went on
    writing, the whole record after it is kept.

    Raises:
        DataError: no such file, or a line that is neither a record nor a torn one.
    """
    path = Path(run_folder) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file; the run has not logged a step yet, or this is not a run folder")
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _record(line)
        if row is not None:
            rows.append(row)
        elif place < len(lines) and not line.startswith("{"):
            raise DataError(f"{path}: line {place} is no record: {line[:60]!r}; mend or delete this line")
    return rows


def curves_section(runs: Mapping[str, Path], *, command: str, title: str = "Training") -> Section:
    """Draw every logged number of one or more run folders against the step, runs overlaid."""
    logs = {name: _by_step(load_metrics(folder)) for name, folder in runs.items()}
    keys = sorted({key for rows in logs.values() for row in rows for key in _numeric(row)}, key=_curve_order)
    charts = []
    for key in keys:
        curves = {}
        for name, rows in logs.items():
            points = [(row["step"], _numeric(row)[key]) for row in rows if key in _numeric(row)]
            curves[name] = ([step for step, _ in points], [value for _, value in points])
        charts.append(line_chart(key, curves))
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else '<p class="empty">Nothing was logged yet.</p>'
    source = ", ".join(str(Path(folder) / "metrics.jsonl") for folder in runs.values())
    return Section(title, (legend(list(runs)) if len(runs) > 1 else "") + body, command, source)


def environment_section(run_folder: Path, *, command: str, title: str = "Environment") -> Section:
    """Tabulate `environment.json` of a run."""
    path = Path(run_folder) / "environment.json"
    rows = [[cell(key, tag="th"), cell(value, "code")] for key, value in _flat(_json(path))]
    return Section(title, table([], rows), command, str(path))


def corpus_section(corpus_folder: Path, *, command: str, title: str = "Corpus") -> Section:
    """Show counts, encoders, hashes and skipped inputs of a prepared corpus from its manifest and ledger."""
    folder = Path(corpus_folder)
    path = folder / "manifest.json"
    manifest: Any = check(_json(path), Manifest, path, "prepare the corpus again")
    counts = manifest.get("counts", {})
    html = table([], [[cell(key.replace("_", " "), tag="th"), cell(f"{value:,}", "num")] for key, value in counts.items()])
    html += "<h3>Encoders</h3>" + _encoders(manifest)
    html += _ledger(folder / "ledger.jsonl")
    digest = file_sha256(path)
    shards = manifest.get("shards", [])
    rows = [[cell(s["file"], "code"), cell(f"{s.get('utterances', 0):,}", "num"), cell(s["sha256"], "code")] for s in shards]
    head = [cell("Shard", tag="th"), cell("Utterances", "num", tag="th"), cell("SHA-256", tag="th")]
    html += f"<p>Manifest SHA-256 <code>{digest}</code></p>"
    html += f"<details><summary>{len(shards)} shards with their hashes</summary>{table(head, rows)}</details>"
    return Section(title, html, command, f"{path}, {folder / 'ledger.jsonl'}")


def _encoders(manifest: Mapping[str, Any]) -> str:
    rows = []
    for modality in ("acoustic", "visual", "text_features"):
        about = manifest.get(modality) or {}
        if not about and modality == "text_features":
            continue
        encoder = about.get("encoder") or {}
        values = [about.get("width", "–"), f"{1000 * about['frame_s']:.0f} ms" if "frame_s" in about else "–"]
        cells = [
            cell(modality, tag="th"),
            cell(encoder.get("name", "–"), "code"),
            cell(encoder.get("revision") or "–", "code"),
        ]
        rows.append([*cells, *(cell(value, "num") for value in [*values, about.get("max_frames", "–")])])
    head = [cell(name, tag="th") for name in ("Modality", "Encoder", "Revision")]
    html = table([*head, *(cell(name, "num", tag="th") for name in ("Width", "Frame", "Most frames"))], rows)
    teacher, tokenizer = manifest.get("visual_emotion"), manifest.get("tokenizer")
    if teacher:
        classes = ", ".join(teacher["classes"])
        digest = escape(str(teacher.get("teacher_sha256") or "–"))
        html += f"<p>Expression teacher: {escape(classes)}; SHA-256 <code>{digest}</code></p>"
    if tokenizer:
        words = f"{tokenizer.get('vocab_size', 0):,} pieces"
        html += f"<p>Tokenizer: {words}; SHA-256 <code>{escape(str(tokenizer['sha256']))}</code></p>"
    return html


def _ledger(path: Path) -> str:
    if not path.is_file():
        return ""
    rows: list[Any] = [check(row, Row, f"{path}, line {number}", "run `emoscale prepare` again") for number, row in read_lines(path)]
    state = {row["path"]: row for row in rows}
    skipped = Counter(str(row.get("reason") or "no reason given") for row in state.values() if row["status"] == "skipped")
    notes: Counter[str] = Counter()
    for row in state.values():
        notes.update({name: count for name, count in (row.get("notes") or {}).items() if isinstance(count, int)})
    done = len(state) - skipped.total()
    html = f"<h3>Inputs</h3><p>{done:,} of {len(state):,} inputs used, {skipped.total():,} skipped.</p>"
    found = [("skipped", text, count) for text, count in skipped.most_common()]
    found += [("utterances", text.replace("_", " "), count) for text, count in notes.most_common() if count]
    if found:
        body = [[cell(what), cell(text), cell(f"{count:,}", "num")] for what, text, count in found]
        html += table([cell("What", tag="th"), cell("Reason", tag="th"), cell("Count", "num", tag="th")], body)
    return html


def _record(line: str) -> dict[str, Any] | None:
    """Read a line, or the whole record that follows a torn one on it."""
    start = 0
    while start >= 0:
        try:
            row = parse_json(line[start:])
        except ValueError:
            start = line.find('{"', start + 1)
            continue
        return row if isinstance(row, dict) and (start == 0 or "step" in row) else None
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the rows of each step; a resumed run logs some steps again, the later value holds."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        if _is_count(row.get("step")):
            merged[row["step"]] = merged.get(row["step"], {}) | row
    return [merged[step] for step in sorted(merged)]


def _numeric(row: Mapping[str, Any]) -> dict[str, float]:
    """Give what is worth a curve in a row; the share of the step spent waiting for data is added."""
    curves = {
        key: float(value)
        for key, value in row.items()
        if key not in NO_CURVES and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    }
    if all(isinstance(row.get(key), float | int) and 0 < row[key] <= LARGEST for key in ("step_time_s", "data_wait_s")):
        curves["data_wait_share"] = row["data_wait_s"] / row["step_time_s"]
    return curves


def _curve_order(key: str) -> tuple[int, str]:
    if key in LAST_CURVES:
        return 100 + LAST_CURVES.index(key), key
    first = next((place for place, name in enumerate(FIRST_CURVES) if key == name or key.startswith(f"{name}/")), 50)
    return first, key


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; is this the right folder?")
    return read_json(path, dict[str, Any], "the file is damaged")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        yield prefix, ", ".join(map(str, value))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{place}")
    else:
        yield prefix, number(value) if isinstance(value, float) and math.isfinite(value) else str(value)
