"""How often the true utterance is found among candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emoscale.config import DataError

MEASURES = ((5, 1), (5, 2), (11, 1), (11, 2))
"""(candidates, places) that TCMP reports: R_5@1, R_5@2, R_11@1, R_11@2."""


def places(scores: ArrayLike, among: int) -> NDArray[np.int64]:
    """Give int64 [q], how many candidates stand before the true one.

    A candidate with the same score stands before it: a model that cannot tell them apart has not found it. A score that is not
    a number finds nothing.

    Args:
        scores: [q, k]; column 0 is the true candidate.
        among: candidates considered, the first `among` columns.

    Raises:
        DataError: there are fewer candidates, or no query.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or not len(table) or table.shape[1] < among or among < 2:
        raise DataError(f"scores of shape {list(table.shape)}: [queries ≥ 1, candidates ≥ {among}] are needed, and 2 candidates at least")
    true, others = table[:, :1], table[:, 1:among]
    found = (others >= true).sum(1) + np.isnan(others).sum(1)
    return np.where(np.isnan(true[:, 0]), among, found)


def recalls(scores: ArrayLike) -> dict[str, float]:
    """Give R_k@m of every measure for which there are candidates enough (TCMP, eq. 24).

    The first 5 of 11 candidates are the 5, so that R_5@m ≥ R_11@m.
    """
    width = np.asarray(scores).shape[-1]
    return {f"R_{k}@{m}": float((places(scores, k) < m).mean()) for k, m in MEASURES if k <= width}


def among_all(scores: ArrayLike) -> NDArray[np.int64]:
    """Give int64 [q], how many of all candidates stand before the true one, as `places` does.

    Args:
        scores: [q, q]; candidate i is the true one of query i.

    Raises:
        DataError: the table is not square, or holds fewer than two.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise DataError(f"scores of shape {list(table.shape)}: as many candidates as queries are needed")
    true = np.diag(table)[:, None]
    others = table[~np.eye(len(table), dtype=bool)].reshape(len(table), -1)
    return places(np.concatenate([true, others], axis=1), len(table))
