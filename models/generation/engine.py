"""The generation engine: continues many prompts at once, each token by token from its state.

    submit → waiting → prefill, chunk by chunk → its samples take slots as these become free → decoding → finished

A step decodes one token of every running sample, then computes one chunk of the next prompt, so that long prompts do
not hold up the samples that are running. A recurrent layer's memory does not depend on the length of a prompt, a
window's is bounded, and full attention takes pages as it needs them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import generating
from kernels.matmul import linear
from models.decoder import Decoder, RunBlock
from models.generation.pages import Pages, PageTable
from models.generation.prefixes import Prefixes
from models.generation.requests import Completion, Event, Finish, Request
from models.generation.sampling import Drawn, draw, uniform
from models.generation.snapshots import Snapshot, fingerprint
from models.generation.states import Slots, State, cells
from models.generation.traced import Tracer
from models.mixers.base import LayerCache
from models.moe.router import Router
from models.parallel import gather_columns
from models.parameters import Module
from models.sinks import SinkKeys


@dataclass
class _Prefill:
    """A prompt whose state is being computed.

    Attributes:
        prompt: The prompt.
        state: The state so far.
        shared: Number of tokens after which the state is worth keeping; 0 if it is not.
    """

    prompt: tuple[int, ...]
    state: State
    shared: int


@dataclass
class _Job:
    """A request that is waiting, being prefilled, starting its samples, or decoded.

    Attributes:
        number: What `submit` returned.
        request: The request.
        prefill: Its prompt, from the first chunk until all samples have drawn their first token.
        started: Number of samples that have.
        reserved: Pages that are promised to the request.
    """

    number: int
    request: Request
    prefill: _Prefill | None = None
    started: int = 0
    reserved: int = 0


@dataclass
class _Sample:
    """A sample that has a slot, or is about to get one.

    Attributes:
        job: Its request.
        number: Its number in the request.
        seen: Tokens that the repetition penalty punishes, bool [vocab_size]; None without a penalty.
        last: The last token that was drawn.
        drawn: Number of tokens drawn.
        experts: Recorded choices of the routers that no event has told yet.
    """

    job: _Job
    number: int
    seen: Tensor | None
    last: int = 0
    drawn: int = 0
    experts: Tensor | None = None


class Engine:
    """Continues prompts with a decoder, whose weights it reads where they are: it may be in training.

    All ranks that share the model (tensor- and expert-parallel ones) call the same methods with the same arguments,
    and get the same events. Context-parallel ranks have whole models, and generate each for itself. After the weights
    have changed, `forget` what was computed with the old ones.

    Args:
        model: The decoder, with all layers, over any tensor- and expert-parallel groups.
        slots: Samples that are continued at once.
        chunk: Prompt tokens that a step computes at most.
        page: Tokens in a page of keys and values of full attention.
        pages: Number of pages; a request waits until there are enough for it. None takes memory as needed.
        vocab_size: Ids from this one on are padding of the vocabulary and are never drawn; default: the model's.
        deterministic: Make the tokens of a sample, to the last bit of their log-probabilities, independent of what
            else is running. Rows are then decoded one at a time.
        compile: Compile the layers of decoding steps: up to twice as fast, rounded differently, after half a minute.
        prefixes: Number of beginnings of prompts whose states are kept for prompts that share them.
        record_experts: Return the experts that routers choose; the gates choose a fixed number of them.

    Raises:
        ValueError: an argument is out of range, there is no compiler for `compile`, the model is a pipeline stage, or
            it has no experts to record.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 16,
        chunk: int = 512,
        page: int = 64,
        pages: int | None = None,
        vocab_size: int | None = None,
        deterministic: bool = False,
        compile: bool = False,
        prefixes: int = 0,
        record_experts: bool = False,
    ) -> None:
        for name, value in {
            "slots": slots,
            "chunk": chunk,
            "page": page,
            "pages": 1 if pages is None else pages,
        }.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if not (model.is_first and model.is_last):
            raise ValueError("the engine needs all layers: no pipeline stages")
        self.model = model
        self.vocab_size = _rows_of_head(model) if vocab_size is None else vocab_size
        self.chunk, self.deterministic = chunk, deterministic
        self._pages = Pages(page, pages)
        self._layers = cells(model, self._pages)
        if not any(cell.pool is not None for layer in self._layers for cell in layer):
            # Without full attention pages are only counted, and cost nothing.
            self._pages.limit, pages = None, None
        self._slots = Slots(self._layers, slots)
        self._tracer = Tracer(model, compile, at_once=compile and deterministic)
        self._prefixes = Prefixes(prefixes, chunk if deterministic else 1)
        self._routers = [module for module in model.modules() if isinstance(module, Router)] if record_experts else []
        gates = {router.config.router.gate for router in self._routers}
        if record_experts and gates != {"top_k"}:
            raise ValueError("record_experts needs routers that choose a fixed number of experts: gate=top_k")
        self._sharded_in_time = [
            module
            for module in model.modules()
            if isinstance(module, Module) and (module.groups.sequence or module.groups.context is not None)
        ]
        self._sinks: list[SinkKeys | None] = [None] * len(self._layers)
        self._waiting: deque[_Job] = deque()
        self._front: _Job | None = None
        self._running: list[_Sample] = []
        self._undelivered: list[Event] = []
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do or to deliver."""
        return not (self._waiting or self._front or self._running or self._undelivered)

    @property
    def waiting(self) -> int:
        """Number of requests whose prompts are not being computed yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that are being prefilled or decoded."""
        return len({sample.job.number for sample in self._running} | ({self._front.number} if self._front else set()))

    @property
    def slots_in_use(self) -> int:
        """Number of samples that have a slot."""
        return self._slots.count

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all running samples; shared pages count once."""
        return self._slots.state_bytes

    def submit(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            ValueError: the prompt is empty or has ids outside the vocabulary, there are no samples, or no number of
                free pages would suffice.
        """
        self._check_prompt(request.prompt)
        if request.samples < 1:
            raise ValueError(f"samples is {request.samples}: it must be at least 1")
        needed = self._pages_for(request)
        if self._pages.limit is not None and needed > self._pages.limit:
            raise ValueError(
                f"the request needs {needed} pages of {self._pages.size} tokens and there are {self._pages.limit}: "
                "shorten it, or take more pages"
            )
        job = _Job(self._submitted, request)
        self._submitted += 1
        self._waiting.append(job)
        return job.number

    def _check_prompt(self, prompt: tuple[int, ...]) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise ValueError(f"the prompt has ids outside the vocabulary of {self.vocab_size} tokens")

    def cancel(self, number: int, sample: int | None = None) -> None:
        """Drop a request, or one running sample of it, and free its slots at once.

        A number that is unknown or has finished is fine.
        """
        if sample is not None:
            for row, running in enumerate(self._running):
                if (running.job.number, running.number) == (number, sample):
                    self._leave(row)
                    break
            return
        self._waiting = deque(job for job in self._waiting if job.number != number)
        self._undelivered = [event for event in self._undelivered if event.request != number]
        for row in reversed(range(len(self._running))):
            if self._running[row].job.number == number:
                self._leave(row)
        if self._front is not None and self._front.number == number:
            self._close_front()

    def step(self) -> list[Event]:
        """Decode one token of all running samples and compute one chunk of a prompt; return the drawn tokens."""
        events, self._undelivered = self._undelivered, []
        return events + self._advance()

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield the events of one request as they come. Other requests continue; `step` returns their events.

        The request is cancelled if the iterator is closed.
        """
        number = self.submit(request)
        left = request.samples
        try:
            while left:
                for event in self._advance():
                    if event.request == number:
                        left -= event.finish is not None
                        yield event
                    else:
                        self._undelivered.append(event)
        finally:
            self.cancel(number)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Complete requests; the result has the samples of each, in order."""
        numbers = [self.submit(request) for request in requests]
        events: dict[int, list[list[Event]]] = {
            number: [[] for _ in range(request.samples)] for number, request in zip(numbers, requests, strict=True)
        }
        left = sum(request.samples for request in requests)
        try:
            while left:
                for event in self._advance():
                    if event.request in events:
                        events[event.request][event.sample].append(event)
                        left -= event.finish is not None
                    else:
                        self._undelivered.append(event)
        finally:
            for number in numbers:
                self.cancel(number)
        return [[Completion.of(sample) for sample in events[number]] for number in numbers]

    def snapshot(self, prompt: Sequence[int]) -> Snapshot:
        """Compute a prompt and return its state, which `restore` takes in this engine or another.

        Raises:
            ValueError: as `submit`.
        """
        prompt = tuple(prompt)
        self._check_prompt(prompt)
        needed = self._claim(len(prompt))
        prefill = self._begin(prompt, len(prompt))
        try:
            with self._inference():
                while not self._fill(prefill):
                    pass
            return Snapshot(prompt, prefill.state.export(), fingerprint(self.model))
        finally:
            prefill.state.table.release()
            self._pages.reserved -= needed

    def restore(self, snapshot: Snapshot) -> None:
        """Take a snapshot: prompts that begin with its tokens continue from it, until `forget`.

        Raises:
            ValueError: the snapshot is of another model, there are not enough free pages for it, or the engine records
                experts, which a snapshot does not have.
        """
        if self._routers:
            raise ValueError("a snapshot has no record of experts: compute the prompt")
        if snapshot.model != fingerprint(self.model):
            raise ValueError("the state is of another model, or of another part of it: compute it again")
        length = len(snapshot.tokens)
        self._claim(length)
        state = State.empty(self._layers, PageTable(self._pages, length))
        state.restore(snapshot.tensors, length)
        self._pages.reserved -= self._prefixes.pin(snapshot.tokens, state)

    def _claim(self, tokens: int) -> int:
        """Reserve pages for so many tokens and return their number; ValueError if they are not free."""
        needed = self._pages.needed(tokens)
        if not self._make_room(needed):
            raise ValueError(f"{tokens} tokens need {needed} pages of {self._pages.size} tokens, which are not free")
        self._pages.reserved += needed
        return needed

    def forget(self) -> None:
        """Forget the states of all prompts: after the weights have changed, they are those of another model."""
        self._pages.reserved -= self._prefixes.clear()
        self._sinks = [None] * len(self._layers)

    # Scheduling

    def _pages_for(self, request: Request) -> int:
        """Pages that a request needs at most."""
        prompt, new = len(request.prompt), request.sampling.max_new_tokens
        if request.samples == 1:
            return self._pages.needed(prompt + new)
        # Each sample copies the prompt's last page unless it is full.
        return self._pages.needed(prompt) + request.samples * self._pages.needed(prompt % self._pages.size + new)

    def _advance(self) -> list[Event]:
        with self._inference():
            events = self._decode()
            if self._front is None:
                self._front = self._next_job()
            if self._front is not None:
                events += self._work_on_front(self._front)
            return events

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Within, nothing is recorded for gradients, and every rank has whole sequences and residual streams."""
        before = [module.groups for module in self._sharded_in_time]
        for module in self._sharded_in_time:
            module.groups = replace(module.groups, sequence=False, context=None)
        try:
            with torch.no_grad(), generating():
                yield
        finally:
            for module, groups in zip(self._sharded_in_time, before, strict=True):
                module.groups = groups

    def _next_job(self) -> _Job | None:
        """Take the next request off the queue if there is a slot, and enough pages, for it."""
        if not self._waiting or self._slots.count == self._slots.size:
            return None
        needed = self._pages_for(self._waiting[0].request)
        if not self._make_room(needed):
            return None
        job = self._waiting.popleft()
        job.reserved = needed
        self._pages.reserved += needed
        return job

    def _make_room(self, needed: int) -> bool:
        """Whether so many pages can be reserved, if necessary after forgetting kept states."""
        limit = self._pages.limit
        while limit is not None and self._pages.reserved + needed > limit and len(self._prefixes):
            self._pages.reserved -= self._prefixes.drop_oldest()
        return limit is None or self._pages.reserved + needed <= limit

    def _work_on_front(self, job: _Job) -> list[Event]:
        """Compute the next chunk of the prompt; once it is complete, start as many samples as there are slots."""
        request = job.request
        if job.prefill is None:
            most = len(request.prompt) + (request.sampling.max_new_tokens if request.samples == 1 else 0)
            job.prefill = self._begin(request.prompt, most)
        return self._start_samples(job, job.prefill.state) if self._fill(job.prefill) else []

    def _begin(self, prompt: tuple[int, ...], most: int) -> _Prefill:
        """Begin with the longest beginning of the prompt whose state is known."""
        known = self._prefixes.longest(prompt)
        state = State.empty(self._layers, PageTable(self._pages, most)) if known is None else known.fork(most)
        return _Prefill(prompt, state, self._prefixes.shared(prompt))

    def _fill(self, prefill: _Prefill) -> bool:
        """Compute one chunk of a prompt. Return whether it is complete."""
        state, prompt = prefill.state, prefill.prompt
        first = state.table.length
        if first < len(prompt):
            # Deterministic chunks end at multiples of their length, wherever a known state begins.
            last = min(len(prompt), first + self.chunk - (first % self.chunk if self.deterministic else 0))
            if first < prefill.shared < last:
                last = prefill.shared
            self._compute(state, prompt[first:last])
            if last == prefill.shared and self._make_room(self._pages.needed(last)):
                self._pages.reserved += self._prefixes.add(prompt[:last], state.fork(last))
        if state.table.length < len(prompt):
            return False
        self._prefixes.note(prompt)
        return True

    def _compute(self, state: State, tokens: tuple[int, ...]) -> None:
        device = self.model.head_weight.device
        first = state.table.length
        state.table.extend(first + len(tokens))
        positions = torch.arange(first, first + len(tokens), device=device)[None]
        row = torch.tensor([tokens], device=device)
        with self._recording() as experts:
            hidden_T1D = self._run(row, positions, state.by_layer())
        state.experts += experts
        state.logits = self._logits(hidden_T1D[-1])

    def _run(self, tokens: Tensor, positions: Tensor, caches: list[LayerCache], run: RunBlock | None = None) -> Tensor:
        """Hidden states [T, B, D]. The sinks are computed once, and then by no step."""
        for cache, sinks in zip(caches, self._sinks, strict=True):
            cache.sinks = sinks
        hidden_TBD = self.model.hidden_states(tokens, positions, caches=caches, run=run)
        self._sinks = [cache.sinks for cache in caches]
        return hidden_TBD

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        """Within, routers record their choices. Afterwards the list has those of all layers, [N, layers, k]."""
        found: list[Tensor] = []
        for router in self._routers:
            router.recorded = []
        try:
            yield found
            if self._routers:
                found.append(torch.stack([choice for router in self._routers for choice in router.recorded or ()], 1))
        finally:
            for router in self._routers:
                router.recorded = None

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] over the whole vocabulary."""
        return gather_columns(linear(hidden_ND, self.model.head_weight), self.model.groups.tensor)

    def _start_samples(self, job: _Job, state: State) -> list[Event]:
        request, events = job.request, []
        assert state.logits is not None
        while job.started < request.samples and self._slots.count < self._slots.size:
            experts = torch.cat(state.experts) if self._routers else None
            sample = _Sample(job, job.started, self._seen(request), experts=experts)
            job.started += 1
            events.append(self._note(sample, self._draw([sample], state.logits)[0]))
            if events[-1].finish is None:
                most = len(request.prompt) + request.sampling.max_new_tokens
                self._slots.add(state if request.samples == 1 else state.fork(most))
                self._running.append(sample)
        if job.started == request.samples:
            self._close_front(is_taken=request.samples == 1 and events[-1].finish is None)
        return events

    def _close_front(self, is_taken: bool = False) -> None:
        """Have no request at the front. `is_taken`: a slot has taken over the state of its prompt."""
        job, self._front = self._front, None
        if job is None:
            return
        if job.prefill is not None and not is_taken:
            job.prefill.state.table.release()
        job.prefill = None
        self._release(job)

    def _release(self, job: _Job) -> None:
        """Take back the pages that are promised to a request, if it is over."""
        if job is not self._front and not any(sample.job is job for sample in self._running):
            self._pages.reserved -= job.reserved
            job.reserved = 0

    def _leave(self, row: int) -> None:
        """Free the slot of a sample. The last row takes its place."""
        job = self._running[row].job
        self._slots.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        self._release(job)

    # Decoding

    def _decode(self) -> list[Event]:
        count = len(self._running)
        if not count:
            return []
        if self.deterministic:
            drawn = [token for row in range(count) for token in self._decode_rows(row, 1)]
        else:
            drawn = self._decode_rows(0, count)
        events = [self._note(sample, token) for sample, token in zip(self._running, drawn, strict=True)]
        # From the last row on: a row that leaves is replaced by the last one.
        for row in reversed(range(count)):
            if events[row].finish is not None:
                self._leave(row)
        return events

    def _decode_rows(self, first: int, count: int) -> list[Drawn]:
        device = self.model.head_weight.device
        samples = self._running[first : first + count]
        step = self._slots.step(first, count, self.deterministic)
        positions = torch.tensor(step.before, device=device)
        tokens = torch.tensor([[sample.last] for sample in samples], device=device)
        caches = step.caches(positions)
        with self._tracer.step(count) as run, self._recording() as experts:
            hidden_1ND = self._run(tokens, positions[:, None], caches, run)
        step.finish()
        for sample, choice in zip(samples, experts[0].split(1) if experts else [], strict=False):
            sample.experts = choice
        return self._draw(samples, self._logits(hidden_1ND[0]))

    def _draw(self, samples: Sequence[_Sample], logits_NV: Tensor) -> list[Drawn]:
        samplings = [sample.job.request.sampling for sample in samples]
        numbers = [uniform(sample.job.request.sampling.seed, sample.number, sample.drawn) for sample in samples]
        return draw(logits_NV, samplings, numbers, [sample.seen for sample in samples], self.vocab_size)

    def _note(self, sample: _Sample, drawn: Drawn) -> Event:
        """Record a sample's next token."""
        sampling = sample.job.request.sampling
        sample.last, sample.drawn = drawn.token, sample.drawn + 1
        if sample.seen is not None:
            sample.seen[drawn.token] = True
        finish: Finish | None = None
        if drawn.token in sampling.stop_tokens:
            finish = "stop"
        elif sample.drawn == sampling.max_new_tokens:
            finish = "length"
        return Event(sample.job.number, sample.number, *drawn, finish, sample.experts)

    def _seen(self, request: Request) -> Tensor | None:
        """The tokens that the repetition penalty of a new sample punishes."""
        if request.sampling.repetition_penalty == 1:
            return None
        device = self.model.head_weight.device
        seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        seen[torch.tensor(request.prompt, device=device)] = True
        return seen


def _rows_of_head(model: Decoder) -> int:
    """Rows of the head over all ranks."""
    group = model.groups.tensor
    return len(model.head_weight) * (1 if group is None else dist.get_world_size(group))
