"""How well lists fit kernels that read whole blocks of channels, and orders of channels that make them fit better.

A block is ``size`` channels beginning at a multiple of ``size``; the last one of a tensor may be shorter. A list covers
the channels of every block that it touches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bap_kernels.flow.graph import Channels

__all__ = ["candidate_orders", "covered", "runs"]


def covered(mask: np.ndarray, size: int) -> int:
    """How many channels the blocks that a list touches have.

    Args:
        mask: (C,) bool, the listed channels.
        size: of a block.

    Examples:
        >>> import numpy as np
        >>> from bap_kernels.plan.cover import covered
        >>> covered(np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=bool), 4)
        6
    """
    blocks = -(-len(mask) // size)
    padded = np.zeros(blocks * size, dtype=bool)
    padded[: len(mask)] = mask
    touched = np.asarray(padded.reshape(blocks, size).any(1))
    beyond = blocks * size - len(mask) if blocks and touched[-1] else 0
    return int(touched.sum()) * size - beyond


def runs(mask: np.ndarray) -> int:
    """How many runs of consecutive channels a list has.

    Examples:
        >>> import numpy as np
        >>> from bap_kernels.plan.cover import runs
        >>> runs(np.array([1, 1, 0, 1], dtype=bool))
        2
    """
    return int(mask[:1].sum() + (mask[1:] & ~mask[:-1]).sum())


def _gray(rows: np.ndarray) -> Channels:
    # The place of a row in the reflected Gray code: neighbours differ in few columns, and the first column has one run.
    ranks = np.cumsum(rows, 1) % 2
    return np.lexsort(ranks.T[::-1])


def _chain(rows: np.ndarray, weights: np.ndarray, start: int) -> Channels:
    """An order in which each row is the nearest of those left to the row before, by weighted Hamming distance."""
    # |a - b| of zeros and ones is a + b - 2 a b.
    sums = rows @ weights
    weighted = rows * weights
    left = np.ones(len(rows), dtype=bool)
    order = np.empty(len(rows), dtype=np.int64)
    row = start
    for place in range(len(rows)):
        order[place] = row
        left[row] = False
        row = int(np.argmin(np.where(left, sums - 2 * (weighted @ rows[row]), np.inf)))
    return order


def _filled(rows: np.ndarray, weights: np.ndarray, sizes: list[int], offset: int, dense_first: bool) -> Channels:
    """Fills blocks one after another with the rows that add the least cost, then chains the blocks.

    Args:
        rows: (n, m) zeros and ones.
        weights: (m,), what one covered channel of each column costs.
        sizes: of blocks, the largest first; the rows of a block are put in order in the same way for the others.
        offset: the first row's place, modulo the largest size.
        dense_first: which row begins a block: of those left, the one in the most lists or in the fewest.
    """
    if not sizes or len(rows) < 2:
        return _gray(rows)
    size = sizes[0]
    totals = rows @ weights
    left = np.ones(len(rows), dtype=bool)
    seeds = np.argsort(-totals if dense_first else totals, kind="stable")
    blocks: list[Channels] = []
    room = size - offset
    for seed in seeds:
        if not left[seed]:
            continue
        members = [int(seed)]
        left[seed] = False
        union = rows[seed].copy()
        while len(members) < room and left.any():
            shared = rows @ (weights * union)
            # What a row adds to the block's lists; of equal ones that which shares the most.
            worth = np.where(left, (totals - shared) * (1 + 1e-6) - 1e-6 * shared, np.inf)
            row = int(np.argmin(worth))
            members.append(row)
            left[row] = False
            union = np.maximum(union, rows[row])
        blocks.append(np.array(members))
        room = size
    unions = np.array([rows[block].max(0) for block in blocks])
    # Where the first or the last block is shorter than others, it must stay there.
    short = [i for i, block in enumerate(blocks) if len(block) != size]
    free = [i for i in range(len(blocks)) if i not in short]
    placed = [free[i] for i in _chain(unions[free], weights, 0)] if free else []
    if 0 in short:
        placed = [0, *placed]
    placed += [i for i in short if i != 0]
    ordered = [blocks[i][_filled(rows[blocks[i]], weights, sizes[1:], 0, dense_first)] for i in placed]
    return np.concatenate(ordered)


def candidate_orders(rows: np.ndarray, weights: np.ndarray, sizes: list[int], offset: int) -> Iterator[Channels]:
    """Orders of channels that put those in the same lists side by side, (n,) each: the channel at each position.

    Args:
        rows: (n, m) bool: whether list j has channel i.
        weights: (m,), what one covered channel costs in list j.
        sizes: of blocks.
        offset: place of the first channel.

    Examples:
        >>> import numpy as np
        >>> from bap_kernels.plan.cover import candidate_orders
        >>> rows = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool)
        >>> next(candidate_orders(rows, np.ones(2), [2], 0)).tolist()
        [2, 0, 3, 1]
    """
    heaviest = np.argsort(-weights * rows.sum(0), kind="stable")
    numbers = rows.astype(np.float64)
    totals = numbers @ weights
    largest_first = sorted(set(sizes), reverse=True)
    orders = [_gray(rows[:, heaviest]), _chain(numbers, weights, int(np.argmin(totals)))]
    for dense_first in (True, False):
        orders.append(_filled(numbers, weights, largest_first, offset % largest_first[0], dense_first))
    for order in orders:
        # Which end is full matters where the last block is shorter.
        yield order[::-1]
        yield order
