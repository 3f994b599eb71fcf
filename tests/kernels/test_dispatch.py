from __future__ import annotations

import pytest
import torch

from emoscale import kernels
from emoscale.kernels.dispatch import Op


def op(reason: str | None) -> Op:
    return Op("double", {"fast": lambda x: 2 * x, "reference": lambda x: x + x}, {"fast": lambda x: reason})


def test_auto_takes_the_first_that_runs() -> None:
    both, one = op(None), op("needs a CUDA device")
    assert both.pick("auto", 1) is both.forms["fast"]
    assert one.pick("auto", 1) is one.forms["reference"]
    assert both.pick("reference", 1) is both.forms["reference"]


def test_a_refusal_says_why() -> None:
    with pytest.raises(ValueError, match="double: impl='fast' cannot run here: needs a CUDA device"):
        op("needs a CUDA device").pick("fast", 1)


def test_an_unknown_implementation_lists_the_known() -> None:
    with pytest.raises(ValueError, match="double: impl='cuda' is not one of auto, fast, reference"):
        op(None).pick("cuda", 1)


def test_explain_tells_taken_available_and_refused() -> None:
    assert op(None).explain(1) == {"fast": "taken", "reference": "available"}
    assert op("no").explain(1) == {"fast": "no", "reference": "taken"}


def test_what_auto_passes_over_runs_when_asked_for() -> None:
    slow = Op("double", {"slow": lambda x: 2 * x, "reference": lambda x: x + x}, {}, {"slow": lambda x: "is slow"})
    assert slow.pick("auto", 1) is slow.forms["reference"]
    assert slow.pick("slow", 1) is slow.forms["slow"]
    assert slow.explain(1) == {"slow": "available", "reference": "taken"}


def test_explain_covers_every_operation_once() -> None:
    table = kernels.explain()
    operations = {"span_mask", "masked_regression", "masked_kl", "max_mean_pool", "varlen_attention"}
    assert operations <= set(table)
    for name, rows in table.items():
        assert list(rows.values()).count("taken") == 1, name
        assert rows["reference"] in ("taken", "available"), name
    if not torch.cuda.is_available():
        assert table["varlen_attention"]["flash"] == "needs a CUDA device"
