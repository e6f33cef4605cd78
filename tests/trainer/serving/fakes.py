"""An engine and a tokenizer for what a real model cannot show at will."""

import time
from itertools import count

from models.generation import Event
from tests.helpers import WAIT


class FakeEngine:
    """Counts: the n-th token of a sample is n. A step takes `pause` seconds and waits for `allowed`, if given."""

    def __init__(self, slots=2, allowed=None, failing_at=(), pause=0.0):
        self.requests, self.drawn, self.cancelled, self.ended = {}, {}, [], set()
        self.slots, self.failing_at, self.numbers = slots, set(failing_at), count()
        self.allowed, self.pause = allowed, pause

    is_idle = property(lambda self: not self.requests)
    slots_in_use = property(lambda self: min(len(self.requests), self.slots))
    waiting = property(lambda self: len(self.requests) - self.slots_in_use)

    def submit(self, request):
        if request.prompt == (13,):
            raise ValueError("no such token")
        number = next(self.numbers)
        self.requests[number], self.drawn[number] = request, 0
        return number

    def cancel(self, number, sample=None):
        if sample is not None:
            self.ended.add((number, sample))
            return
        self.cancelled.append(number)
        self.requests.pop(number, None)

    def step(self):
        time.sleep(self.pause)
        if self.allowed is not None:
            assert self.allowed.acquire(timeout=WAIT)
        events = []
        for number, request in list(self.requests.items())[: self.slots]:
            drawn = self.drawn[number]
            if (request.prompt[0], drawn) in self.failing_at:
                raise FloatingPointError("not a number")
            finish = "length" if drawn + 1 == request.sampling.max_new_tokens else None
            samples = [sample for sample in range(request.samples) if (number, sample) not in self.ended]
            events += [Event(number, sample, drawn, 0.0, 0.0, (), finish) for sample in samples]
            self.drawn[number] += 1
            if finish:
                del self.requests[number]
        return events


class FakeTokenizer:
    """Every token is an x."""

    vocab_size, eod_id, eod = 100, 0, "<end>"

    def encode(self, text):
        return [1] * len(text)

    def decode(self, tokens):
        return "x" * len(tokens)
