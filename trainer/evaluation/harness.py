"""A model for the lm-eval harness (EleutherAI, github.com/EleutherAI/lm-evaluation-harness), offline on local tasks.

Requests of all lengths are computed together: log-likelihoods in packed rows (trainer.evaluation.scoring), texts by
the generation engine. What a request means is as in the harness's own adapter of transformers, so that both give the
same figures for the same model, with one exception: a text without a context follows the end of a document, and a model
that was trained with document masks does not see that token, here as in training.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from models.generation import Engine, Request, Sampling, StopStrings, TextStream
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.evaluation.scoring import Query, Scorer
from trainer.logs import CONSOLE

# Of generation_kwargs, what Sampling has under the same name.
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Answers the harness's requests.

    Args:
        scorer: Of the model.
        tokenizer: The model's.
        max_length: Most tokens of a text. Longer contexts lose their beginning.
        slots: Texts that are generated at once.
        seed: Seed of the draws, where a task asks for any.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, max_length: int, slots: int, seed: int) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._max_length = scorer, tokenizer, max_length
        self._slots, self._seed = slots, seed

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self._tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; no token is added to it."""
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm_eval.api.model.LM."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        queries, shortened = [], 0
        for _texts, context, continuation in requests:
            # The last token is only a label. What is asked for is never cut.
            kept = max(self._max_length + 1, len(continuation) + 1)
            tokens = (context + continuation)[-kept:]
            shortened += len(tokens) < len(context) + len(continuation)
            queries.append(Query(tokens, len(tokens) - len(continuation)))
        self._note_shortened(shortened, len(requests))
        return [(score.total, score.is_greedy) for score in self._scorer.score(queries, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See lm_eval.api.model.LM."""
        queries, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self._max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                queries.append(Query([*context, *continuation], len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(queries, "log-likelihoods of whole texts")):
            totals[owner] += score.total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See lm_eval.api.model.LM."""
        prompts = [self._prompt(request.args[0], request.args[1], number) for number, request in enumerate(requests)]
        shortened = sum(prompt.is_shortened for prompt in prompts)
        self._note_shortened(shortened, len(prompts))
        engine = Engine(self._scorer.model, slots=self._slots, vocab_size=self._scorer.vocab_size)
        return continue_texts(engine, self._tokenizer, prompts)

    def _prompt(self, context: str, arguments: dict[str, Any], number: int) -> "Prompt":
        """A request as the engine takes it.

        Raises:
            ConfigError: the task asks for what the engine does not do, or leaves no room for the prompt.
        """
        settings = dict(normalize_gen_kwargs(arguments))
        room = self._max_length - settings["max_gen_toks"]
        if room < 1:
            raise ConfigError(
                f"tasks: one wants {settings['max_gen_toks']} new tokens, which leaves no room for its prompts in "
                f"{self._max_length}; raise --seq_len, or lower max_gen_toks in the task's generation_kwargs"
            )
        others = {key: value for key, value in settings.items() if key in _SAMPLING}
        known = {"until", "max_gen_toks", "do_sample", "temperature", "num_beams", *others}
        unknown = [key for key in settings if key not in known] + ["num_beams"] * (settings.get("num_beams", 1) != 1)
        if unknown:
            raise ConfigError(
                f"tasks: generation_kwargs has {', '.join(unknown)}, which is not supported; leave it out"
            )
        # As in generation: a text without a prompt follows the end of a document.
        tokens = self._tokenizer.encode(context) or [self._tokenizer.eod_id]
        temperature = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0
        try:
            sampling = Sampling(
                settings["max_gen_toks"],
                temperature,
                seed=self._seed + number,
                stop_tokens=(self._tokenizer.eod_id,),
                **others,
            )
        except ValueError as error:
            raise ConfigError(f"tasks: generation_kwargs: {error}") from error
        stops = tuple(stop for stop in settings["until"] if stop)
        return Prompt(tuple(tokens[-room:]), len(tokens) > room, sampling, stops)

    def _note_shortened(self, count: int, total: int) -> None:
        if count:
            print(
                f"{count} of {total} prompts have more than {self._max_length} tokens and lose their beginning; "
                "--seq_len raises the limit",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: Its token ids.
        is_shortened: Whether its beginning was cut.
        sampling: How to draw.
        stops: Strings before which the continuation ends.
    """

    tokens: tuple[int, ...]
    is_shortened: bool
    sampling: Sampling
    stops: tuple[str, ...]


class _Continuation:
    """The text of one running request."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self._stream, self._stops = TextStream(tokenizer.decode, prompt.tokens), StopStrings(prompt.stops)
        self.text = ""

    def feed(self, token: int) -> bool:
        """Add a token. Returns whether a stop string has ended the text."""
        self.text += self._stops.feed(self._stream.feed(token))
        return self._stops.stopped is not None

    def finish(self) -> None:
        """Add what was held back."""
        self.text += self._stops.feed(self._stream.finish()) + self._stops.finish()


def continue_texts(engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Continue all prompts, with a progress bar.

    Raises:
        ConfigError: the model's logits are not numbers.
    """
    running: dict[int, _Continuation] = {}
    # Those that stop at a string end early, so the longest prompts go first.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens), reverse=True)
    places = {engine.submit(Request(prompts[number].tokens, prompts[number].sampling)): number for number in order}
    texts = [""] * len(prompts)
    with Progress(console=CONSOLE, transient=True) as progress:
        bar = progress.add_task("generating", total=len(prompts))
        while places:
            try:
                events = engine.step()
            except FloatingPointError as error:
                raise ConfigError(f"checkpoint: {error}; choose another") from error
            for event in events:
                if event.request not in places:
                    continue
                place = places[event.request]
                text = running.setdefault(event.request, _Continuation(tokenizer, prompts[place]))
                has_stopped = event.finish != "stop" and text.feed(event.token)
                if has_stopped:
                    engine.cancel(event.request)
                if has_stopped or event.finish is not None:
                    text.finish()
                    texts[places.pop(event.request)] = running.pop(event.request).text
                    progress.advance(bar)
    return texts
