"""What the fault table is made of: one file per row with every injection so far, and the pages written from them.

python -m tests.faults.ledger    # benchmarks/faults/<date>.json and the table in benchmarks/faults/README.md
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "benchmarks" / "faults"
COLUMNS = ("fault", "where", "injections", "lost_or_twice", "steps_repeated", "resume_s", "equal", "package")
"""Keys of a row; whoever injects a fault writes them."""
HEAD = "| fault | where | injections | utterances lost or seen twice | steps repeated | time to resume, s | end equal | package |\n|---|---|---|---|---|---|---|---|"


def results() -> Path:
    """Give the folder of the rows, which `EMOSCALE_FAULT_RESULTS` names."""
    return Path(os.environ.get("EMOSCALE_FAULT_RESULTS", ROOT / "build" / "faults"))


class Ledger:
    """The injections of one row, kept in its file after each; those of another state of the package are dropped.

    Args:
        fault: the row's name.
        where: `in process`, `SLURM` or `gateway`.
    """

    def __init__(self, fault: str, where: str = "in process") -> None:
        self.path = results() / f"{re.sub(r'[^a-z0-9]+', '-', fault.lower()).strip('-')}.json"
        self.fault, self.where, self.package = fault, where, package()
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.done: list[dict[str, Any]] = kept["each"] if kept.get("package") == self.package else []

    def add(self, injection: dict[str, Any]) -> None:
        """Keep one more: `lost_or_twice`, `repeated` (steps, None where it cannot be said), `resume_s`, `equal`, and what else tells of it."""
        self.done.append(injection)
        repeated = [one["repeated"] for one in self.done if one["repeated"] is not None]
        row = {
            "fault": self.fault, "where": self.where, "injections": len(self.done), "lost_or_twice": sum(one["lost_or_twice"] for one in self.done),
            "steps_repeated": [min(repeated), max(repeated)] if repeated else None, "resume_s": round(statistics.median(one["resume_s"] for one in self.done), 2),
            "equal": all(one["equal"] for one in self.done), "package": self.package, "each": self.done,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".writing")
        aside.write_text(json.dumps(row, indent=1))
        os.replace(aside, self.path)


def package() -> str:
    """Name the state of the package by its content, `git rev-parse HEAD:emoscale`, which outlives commits: results of another are no part of a row."""
    return _git("rev-parse", "--short=10", "HEAD:emoscale") + (
        f"+{_git('diff', 'HEAD', '--stat', '--', 'emoscale').splitlines()[-1].strip()}" if _git("status", "--porcelain", "emoscale") else ""
    )


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    lines = [HEAD]
    for row in rows:
        repeated = "–" if row["steps_repeated"] is None else "–".join(str(step) for step in dict.fromkeys(row["steps_repeated"]))
        lines.append(
            f"| {row['fault']} | {row['where']} | {row['injections']} | {row['lost_or_twice']} | {repeated} | {row['resume_s']} | "
            f"{'yes' if row['equal'] else 'no'} | `{row['package']}` |"
        )
    return "\n".join(lines)


def publish(folder: Path, pages: Path = PAGES) -> list[dict[str, Any]]:
    """Write what a folder of rows holds into today's file and the page's table; give the rows.

    Rows of the newest file that the folder has no other of stay: a SLURM or a gateway may have been disturbed elsewhere.

    Raises:
        ValueError: a row lacks a key.
    """
    before = sorted(pages.glob("2*.json"))
    known = {(row["where"], row["fault"]): row for row in (json.loads(before[-1].read_text()) if before else [])}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        missing = [key for key in COLUMNS if key not in row]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}")
        known[row["where"], row["fault"]] = {key: row[key] for key in COLUMNS}
    rows = [known[key] for key in sorted(known)]
    (pages / f"{time.strftime('%Y-%m-%d')}.json").write_text(json.dumps(rows, indent=1) + "\n")
    page = pages / "README.md"
    page.write_text(between(page.read_text(), "table", table(rows)))
    figures = folder / "soak" / "figures.json"
    if figures.is_file():
        found = json.loads(figures.read_text())
        (pages / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
        page.write_text(between(page.read_text(), "soak", soaked(found)))
    return rows


def soaked(found: dict[str, Any]) -> str:
    """Write what a soak has shown as Markdown."""
    faults = ", ".join(f"{count} × {name}" for name, count in found["faults"].items())
    lines = [
        f"- package `{found['package']}`: {found['steps']} steps on {found['ranks']} ranks, {faults}; {found['steps_computed']} steps were computed, {found['resume_s']} s to resume (median)",
        f"- utterances lost or seen twice: {found['lost_or_twice']}; metrics, weights, moments and random states of the end equal, bit for bit: {'yes' if found['equal'] else 'no'}",
        *(f"- memory, {name}: {value:.2f} MiB" for name, value in found["rss_mib"].items()),
        *(
            f"- entries of {name}, after the first start, at most, at the end: {' · '.join(map(str, found[key]))}"
            for name, key in (("/dev/shm", "shm_entries"), ("the temporary folder", "tmp_entries"))
        ),
    ]
    return "\n".join(lines)


def between(page: str, name: str, content: str) -> str:
    """Put new content between the marks of a page.

    Raises:
        ValueError: there are no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"no {begin} … {end} in the page")
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    print(table(publish(results())))
