"""The score at an exact rank among billions, found in bounded memory as the scores pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_DISTINCT = 1 << 20  # values that a tally keeps apart
_PENDING = 1 << 21  # scores that it sorts at a time
LOWEST, HIGHEST = -(2**31) + 2**23 + 1, 2**31 - 2**23  # the finite floats' keys, end excluded


def keys_of(scores: np.ndarray) -> np.ndarray:
    """Finite float32 scores as int64 that order alike and are consecutive for neighbours."""
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 makes -0.0 one with 0.0
    return np.where(bits >= 0, bits, -(2**31) - bits)


def value_of(key: int) -> np.float32:
    """The float32 of a key; infinity for the end of the range."""
    if key >= HIGHEST:
        return np.float32(np.inf)
    return np.float32(np.int32(key if key >= 0 else -(2**31) - key).view(np.float32))


class Tally:
    """Counts of scores by value in bounded memory.

    When there are more distinct values than ``_DISTINCT``, neighbouring ones are counted together:
    an entry e then stands for the keys from ``e << shift`` up to ``(e + 1) << shift``, exclusive.
    """

    def __init__(self) -> None:
        self.shift = 0
        self.entries = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._waiting = 0

    def add(self, scores: np.ndarray) -> None:
        """Take scores (n,); they are counted when enough wait."""
        self._pending.append(scores)
        self._waiting += len(scores)
        if self._waiting >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Count what waits."""
        if not self._waiting:
            return
        keys, counts = np.unique(keys_of(np.concatenate(self._pending)), return_counts=True)
        self._pending, self._waiting = [], 0
        self.entries = np.concatenate([self.entries, keys >> self.shift])
        self.counts = np.concatenate([self.counts, counts])
        self._merge()
        while len(self.entries) > _DISTINCT:
            self.shift += 1
            self.entries >>= 1
            self._merge()

    def _merge(self) -> None:
        order = np.argsort(self.entries, kind="stable")
        entries = self.entries[order]
        starts = np.flatnonzero(np.concatenate([[True], entries[1:] != entries[:-1]]))
        self.entries, self.counts = entries[starts], np.add.reduceat(self.counts[order], starts)


@dataclass
class Search:
    """The search for the score at one rank: it is known to lie in keys [low, high)."""

    rank: int  # the wanted score has exactly this many impostor scores before it, from the top
    low: int = LOWEST
    high: int = HIGHEST
    bracket: tuple[int, int] = (LOWEST, HIGHEST)
    above: int = 0
    tally: Tally = field(default_factory=Tally)
    guess: np.float32 | None = None  # a score near the wanted one, where a sample tells
    bound: np.float32 | None = None

    def conclude(self) -> None:
        """After a pass: settle the bound, or narrow the interval for the next pass."""
        self.tally.flush()
        before = self.above + np.cumsum(self.tally.counts[::-1])  # down to each entry, inclusive
        if self.above > self.rank:
            self.low = self.bracket[1]
        elif len(before) == 0 or before[-1] <= self.rank:
            self.high = self.bracket[0]
        else:
            entry = int(self.tally.entries[::-1][np.searchsorted(before, self.rank, side="right")])
            if self.tally.shift == 0:
                self.bound = value_of(entry)
            self.low = max(self.low, self.bracket[0], entry << self.tally.shift)
            self.high = min(self.high, self.bracket[1], (entry + 1) << self.tally.shift)
        self.bracket = (self.low, self.high)
        self.above, self.tally = 0, Tally()
