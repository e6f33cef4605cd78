"""States of the beginnings of prompts, kept for prompts that share them.

A state is kept where two prompts have been seen to part, for example at the end of a system prompt: the second prompt
that shares it computes and keeps the state, and the third one begins there (the admission rule of Marconi, arXiv
2411.19379, for states that, unlike keys and values, cannot be cut).
"""

from collections import OrderedDict, deque

from models.generation.states import State

# Shorter beginnings are computed again: a first token, or a template's, is no reason to keep a state.
_SHORTEST = 16


class Prefixes:
    """The kept states, and the prompts that they may be parts of.

    Args:
        limit: Number of states, besides those that `restore` pinned; and of prompts to compare new ones to.
        step: States are kept after multiples of this many tokens only.
    """

    def __init__(self, limit: int, step: int = 1) -> None:
        self._limit, self._step = limit, step
        self._states: OrderedDict[tuple[int, ...], State] = OrderedDict()
        self._pinned: dict[tuple[int, ...], State] = {}
        self._prompts: deque[tuple[int, ...]] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, prompt: tuple[int, ...]) -> State | None:
        """The state of the longest known beginning of the prompt."""
        known = [tokens for tokens in (*self._states, *self._pinned) if prompt[: len(tokens)] == tokens]
        if not known:
            return None
        best = max(known, key=len)
        if best in self._states:
            self._states.move_to_end(best)
            return self._states[best]
        return self._pinned[best]

    def shared(self, prompt: tuple[int, ...]) -> int:
        """How many of the prompt's tokens a recent prompt begins with, if their state is worth keeping; 0 if not."""
        length = max((_common(prompt, other) for other in self._prompts), default=0)
        length -= length % self._step
        return length if length >= _SHORTEST and prompt[:length] not in self._states else 0

    def note(self, prompt: tuple[int, ...]) -> None:
        """Remember a prompt, for `shared`."""
        if prompt not in self._prompts:
            self._prompts.append(prompt)

    def add(self, tokens: tuple[int, ...], state: State) -> int:
        """Keep a state. Return by how many pages the states now hold more."""
        grown = state.table.held
        self._states[tokens] = state
        while len(self._states) > self._limit:
            grown -= self.drop_oldest()
        return grown

    def pin(self, tokens: tuple[int, ...], state: State) -> int:
        """Keep a state until `clear`. Return the pages of the one that it replaces."""
        before = self._pinned.pop(tokens, None)
        self._pinned[tokens] = state
        return 0 if before is None else _release(before)

    def drop_oldest(self) -> int:
        """Forget the state that was not used for the longest time. Return the pages that it held."""
        _, state = self._states.popitem(last=False)
        return _release(state)

    def clear(self) -> int:
        """Forget everything. Return the pages that the states held."""
        held = sum(_release(state) for state in (*self._states.values(), *self._pinned.values()))
        self._states.clear()
        self._pinned.clear()
        self._prompts.clear()
        return held


def _release(state: State) -> int:
    held = state.table.held
    state.table.release()
    return held


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of tokens with which both begin, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
