"""Text of tokens as they arrive: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence


class TextStream:
    """Turns tokens into the text that they add to a prompt, in pieces of whole characters.

    The text of a token depends on the previous one: some tokenizers write a space before each word except the first,
    and a character may span several tokens. Each piece is therefore the difference between two decoded texts that both
    start slightly earlier (as in text-generation-inference). The pieces concatenate to decode(prompt + tokens) without
    the text of the prompt.

    Args:
        decode: Maps tokens to text; incomplete characters become U+FFFD.
        prompt: Preceding tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        # The decoded window starts one piece before the text that is still to be returned.
        self._window, self._known = list(prompt), len(prompt)
        self._before = self._text = decode(self._window)

    def feed(self, token: int) -> str:
        """Return the text that the token completes; empty while a character waits for its remaining bytes."""
        self._window.append(token)
        self._text = self._decode(self._window)
        if len(self._text) <= len(self._before) or self._text.endswith("\ufffd"):
            return ""
        piece = self._text[len(self._before) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._before = self._text = self._decode(self._window)
        return piece

    def finish(self) -> str:
        """Return what is left: bytes that never became a character, as U+FFFD."""
        return self._text[len(self._before) :]


def stream_text(decode: Callable[[list[int]], str], prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that tokens add to a prompt, as the tokens arrive; see `TextStream`."""
    stream = TextStream(decode, prompt)
    for token in tokens:
        if piece := stream.feed(token):
            yield piece
    if rest := stream.finish():
        yield rest


class StopStrings:
    """Ends text before the stop string that is complete first, and holds back what may become one.

    Args:
        stops: The strings; empty ones are not allowed.

    Attributes:
        stopped: The stop string that ended the text; None while there was none.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string is empty: it would end every text at once")
        self._held = ""
        self.stopped: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that can be shown now that `text` has arrived. After a stop string it is always empty."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        # By their ends: which one is first must not depend on how the text is cut.
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        return shown

    def finish(self) -> str:
        """Return the held text, which became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
