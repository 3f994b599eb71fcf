"""A rank of a job with a record of its steps: `EMOSCALE_PYTHON` is a script that runs this with what Python would get.

python -m tests.slurm.watched RECORDS -m emoscale pretrain …
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tests.faults.strike import watched
from tests.faults.trials import newest


def main() -> None:
    """Leave `start_<n>/start.json` (when this start began, and behind which step) and what `watched` records."""
    records = Path(sys.argv[1]) / f"start_{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    words = sys.argv[sys.argv.index("pretrain") + 1 :]
    output = next(word for word in words if word.startswith("run.output=")).partition("=")[2]
    records.mkdir(parents=True, exist_ok=True)
    os.environ["RANK"] = os.environ["SLURM_PROCID"]  # as emoscale sets it, only earlier
    os.environ |= {"WORLD_SIZE": os.environ["SLURM_NTASKS"], "LOCAL_RANK": os.environ["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": "1"}
    if os.environ["RANK"] == "0":
        (records / "start.json").write_text(json.dumps({"began": time.time(), "first": newest(Path(output) / "checkpoints")}))
    watched(str(records), None, *words)


if __name__ == "__main__":
    main()
