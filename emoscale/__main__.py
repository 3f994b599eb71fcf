"""`python -m emoscale`, which is how `torchrun -m` starts it."""

from __future__ import annotations

from emoscale.cli import main

if __name__ == "__main__":
    main()
