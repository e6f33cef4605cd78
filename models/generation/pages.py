"""Pages: fixed numbers of tokens into which the memory for keys and values is divided (arXiv 2309.06180).

A page has a number, and belongs to the same tokens in every full-attention layer. Sequences that continue one prompt
share its full pages; a page is free again when the last of them ends. Pages of a sequence lie beside each other as far
as possible, because consecutive pages are read as one matrix.
"""

from collections.abc import Callable, Sequence

import numpy as np

# Tokens that a sequence gets memory for ahead of the need, at least.
_AHEAD = 1024


class Pages:
    """Which pages are in use, and by how many sequences.

    Args:
        size: Tokens per page.
        limit: Number of pages; None lets it grow with the need.

    Attributes:
        reserved: Pages that are promised to running requests, for `limit`.
        on_take: Called with the pages that a sequence takes.
    """

    def __init__(self, size: int, limit: int | None) -> None:
        self.size, self.limit = size, limit
        self.reserved = 0
        self._users = np.zeros(limit or 0, np.int64)
        self.on_take: list[Callable[[list[int]], None]] = []

    @property
    def capacity(self) -> int:
        """Number of pages that there are."""
        return len(self._users)

    @property
    def used(self) -> int:
        """Number of pages in use."""
        return int((self._users > 0).sum())

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def take(self, number: int, after: int | None = None) -> list[int]:
        """Take free pages: beside each other if possible, best of all the ones that follow page `after`."""
        free = self._users == 0
        taken: list[int] = []
        if after is not None:
            follows = free[after + 1 : after + 1 + number]
            taken = list(range(after + 1, after + 1 + (len(follows) if follows.all() else int(follows.argmin()))))
            free[taken] = False
        missing = number - len(taken)
        first = _first_run(free, missing)
        if first is not None:
            taken += range(first, first + missing)
        elif self.limit is None:
            taken += self._grow(free, missing)
        else:
            rest = np.flatnonzero(free)[:missing].tolist()
            assert len(rest) == missing, "requests begin only if there are enough pages for them"
            taken += rest
        self._users[taken] += 1
        for call in self.on_take:
            call(taken)
        return taken

    def in_use(self) -> list[int]:
        """The pages in use."""
        return np.flatnonzero(self._users > 0).tolist()

    def share(self, pages: list[int]) -> None:
        """Add a sequence that uses the pages."""
        self._users[pages] += 1

    def release(self, pages: list[int]) -> None:
        """Remove a sequence that used the pages."""
        self._users[pages] -= 1

    def _grow(self, free: np.ndarray, number: int) -> range:
        """Add pages, at least twice as many as before, and return `number` of the last free ones."""
        used = np.flatnonzero(~free)
        first = int(used[-1]) + 1 if len(used) else 0
        self._users = np.concatenate([self._users, np.zeros(max(first + number, len(free)), np.int64)])
        return range(first, first + number)


def _first_run(free: np.ndarray, number: int) -> int | None:
    """The first of `number` free pages beside each other."""
    if not number:
        return 0
    edges = np.diff(np.concatenate([[0], free.astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    fits = np.flatnonzero(ends - starts >= number)
    return int(starts[fits[0]]) if len(fits) else None


class PageTable:
    """The pages of one sequence, in the order of its tokens.

    Args:
        pages: Where they are taken from.
        most: Tokens that the sequence may have at most.

    Attributes:
        length: Number of tokens whose keys and values the pages hold.
    """

    def __init__(self, pages: Pages, most: int) -> None:
        self.pages, self.most = pages, most
        self.length = 0
        self._own: list[int] = []
        self._runs: list[tuple[int, int]] = []

    @property
    def held(self) -> int:
        """Number of pages that the sequence uses, shared ones included."""
        return len(self._own)

    def extend(self, length: int) -> None:
        """Make room for so many tokens in all, and count them as held."""
        assert self.length <= length <= self.most, "a sequence has at most the tokens that it was opened for"
        missing = self.pages.needed(length) - len(self._own)
        if missing > 0:
            # Ahead of the need, so that a sequence is few runs of memory; at most twice as many as before.
            ahead = max(len(self._own), self.pages.needed(_AHEAD))
            ahead = min(missing + ahead, self.pages.needed(self.most) - len(self._own))
            self._own += self.pages.take(ahead, self._own[-1] if self._own else None)
            self._runs = merged(self._own)
        self.length = length

    def runs(self) -> list[tuple[int, int]]:
        """Where the tokens lie: (start, end) of runs of memory, counted in tokens, in the order of the sequence."""
        size, left = self.pages.size, self.length
        found = []
        for first, count in self._runs:
            tokens = min(count * size, left)
            if tokens:
                found.append((first * size, first * size + tokens))
            left -= tokens
        return found

    @property
    def end(self) -> int:
        """Where the memory ends that the sequence has from its last run on."""
        left = self.length
        for first, count in self._runs:
            left -= count * self.pages.size
            if left <= 0:
                return (first + count) * self.pages.size
        raise AssertionError("a sequence has memory for all of its tokens")

    def place(self, token: int) -> int:
        """Where one token lies."""
        page, within = divmod(token, self.pages.size)
        return self._own[page] * self.pages.size + within

    def fork(self, most: int) -> tuple["PageTable", tuple[int, int] | None]:
        """A table of a sequence that continues this one, which shares its full pages.

        Returns:
            The table, and (page, page to copy it to) if the last page is not full.
        """
        table = PageTable(self.pages, most)
        full, rest = divmod(self.length, self.pages.size)
        shared = self._own[:full]
        self.pages.share(shared)
        own = self.pages.take(1, shared[-1] if shared else None) if rest else []
        table._own, table.length = shared + own, self.length
        table._runs = merged(table._own)
        return table, (self._own[full], own[0]) if rest else None

    def release(self) -> None:
        """Give all pages back."""
        self.pages.release(self._own)
        self._own, self._runs, self.length = [], [], 0


def merged(pages: Sequence[int]) -> list[tuple[int, int]]:
    """(first page, count) of the runs of consecutive pages."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
