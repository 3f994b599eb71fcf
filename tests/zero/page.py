"""The table of what the ZeRO matrix has run: python -m tests.zero.page, after `pytest -m slow tests/zero`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.ledger import ROOT, between, package

FOUND = ROOT / "build" / "zero" / "cells.json"
PAGE = ROOT / "benchmarks" / "zero" / "README.md"
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (0.2, 0.02)}
"""Relative distance of what the steps did to the weights, and of the losses, from the reference. TCMP's scores are products of long vectors:
rounded to bf16 they cost a gradient a seventh, on one rank as on two, where MEmoBERT's loses a hundredth."""
HEAD = "| system | stage | precision | recomputed | frozen | ranks | batch | micro-batches | loss of the last step | weights, relative L2 |\n|---|---|---|---|---|---|---|---|---|---|"
UNRUN = "| any | 1, 2, 3 | fp32, bf16 | – | – | – | – | – | optimizer offloaded: **not run**, needs a GPU | – |\n| any | 3 | fp32, bf16 | – | – | – | – | – | parameters offloaded: **not run**, needs a GPU | – |"


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    lines = [HEAD]
    for row in sorted(rows, key=lambda row: list(row["cell"].values())):
        cell = row["cell"]
        told = [
            cell["system"],
            cell["stage"],
            cell["precision"],
            *("yes" if cell[name] else "no" for name in ("recompute", "frozen")),
            cell["ranks"],
            cell["batch"],
        ]
        lines.append("| " + " | ".join(map(str, [*told, row["micro_batches"], f"{row['losses'][-1]:.4f}", f"{row['weights']:.0e}"])) + " |")
    return "\n".join([*lines, UNRUN])


def publish(found: Path = FOUND, page: Path = PAGE) -> None:
    """Write the table and its rows."""
    rows = json.loads(found.read_text())
    page.with_name("cells.json").write_text(json.dumps({"package": package(), "cells": rows}, indent=1) + "\n")
    page.write_text(between(page.read_text(), "cells", f"Package `{package()}` (`git rev-parse HEAD:emoscale`), {len(rows)} cells:\n\n{table(rows)}"))


if __name__ == "__main__":
    publish()
