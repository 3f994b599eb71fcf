"""`python -m tests.fuzz --inputs 100000`: the whole fuzz run, which goes on where it stopped; its result is one JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.ledger import package
from tests.fuzz.runner import Tally, attempt, try_all
from tests.fuzz.seeds import Seeds
from tests.fuzz.surfaces import SURFACES

RESULT = Path(__file__).parent / "results" / "fuzz.json"


def main() -> int:
    """Run, and give the exit code: 1 where anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND[/NUMBER]", help="kinds of input; with a number, that one input in this process")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    with TemporaryDirectory(prefix="emoscale-fuzz-") as folder:
        seeds = Seeds(Path(folder))
        single = [word.split("/") for word in given.only if "/" in word]
        for name, number in single:
            print(name, number, *attempt(seeds, name, SURFACES[name].attempt, int(number), given.seed))
        return 0 if single else _run(seeds, given)


def _run(seeds: Seeds, given: argparse.Namespace) -> int:
    about = {"package": package(), "seed": given.seed, "inputs": given.inputs}
    known = json.loads(given.result.read_text()) if given.result.is_file() else {}
    if any(known.get(key) != value for key, value in about.items()):
        known = {}
    tallies = {name: Tally(**known.get("kinds", {}).get(name, {})) for name in SURFACES if name in given.only or not given.only}

    def save() -> None:
        totals = {key: sum(getattr(tally, key) for tally in tallies.values()) for key in ("parsed", "refused", "failures")}
        found = (
            about | {"tried": sum(tally.inputs for tally in tallies.values())} | totals | {"kinds": {name: asdict(tally) for name, tally in tallies.items()}}
        )
        given.result.parent.mkdir(parents=True, exist_ok=True)
        given.result.write_text(json.dumps(found, indent=1) + "\n")

    whole = sum(SURFACES[name].share for name in tallies)
    for name, tally in tallies.items():
        try_all(seeds, name, SURFACES[name], round(given.inputs * SURFACES[name].share / whole + 0.5), given.seed, tally, save)
    print(
        f"{sum(tally.inputs for tally in tallies.values()):,} inputs, {(failures := sum(tally.failures for tally in tallies.values())):,} failures: {given.result}",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
