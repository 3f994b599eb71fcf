"""What a process tells its launcher beyond an exit code, which `srun` hides: a small file that a variable names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from emoscale.distributed import NodeError, World

VARIABLE = "EMOSCALE_OUTCOME"
"""Names the file; a launcher does not know the run folder."""


def tell(**told: Any) -> None:
    """Write the file, whole; of several ranks that write at once, the last one stands."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path = Path(name)
    aside = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}")
    aside.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8", errors="surrogateescape")  # a path's own bytes, for a shell to read
    os.replace(aside, path)


def tell_unfit(error: NodeError, folder: Path, world: World) -> None:
    """Name the nodes that are not fit; the first rank does it for all, but where another could tell none."""
    if error.alone or world.is_main:
        tell(finished=False, reason=error.reason, unfit=error.nodes, output=str(folder.resolve()))
