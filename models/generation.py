"""Autoregressive sampling with cached states, one token at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.matmul import linear
from models.decoder import Decoder
from models.mixers.base import LayerCache


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token for each row of logits.

    Args:
        logits: [B, V].
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the most likely tokens whose probabilities add up to this (nucleus sampling, arXiv 1904.09751).
        generator: Source of randomness.

    Returns:
        int64 [B].

    Raises:
        FloatingPointError: the largest logit of a row is not finite (argmax would accept it), or the temperature is too
            small for the logits.
    """
    # amax propagates NaN.
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the model gives logits that are not numbers, or infinite")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if probabilities.isnan().any():
        raise FloatingPointError(f"temperature {temperature} is too small for the model's logits (0 is greedy)")
    if top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
        # Keep a token if the tokens before it sum to less than top_p: the most likely token is always kept.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream_tokens(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens, int64 [B], as they are drawn.

    Args:
        model: The decoder.
        prompt: Token ids, int64 [B, T] with T >= 1.
        max_new_tokens: Number of tokens to draw.
        temperature: See `sample_token`.
        top_p: See `sample_token`.
        generator: See `sample_token`.
        vocab_size: Ids from this one on are embedding padding and are never drawn.
    """
    caches = [LayerCache() for _ in model.layers]
    tokens, position = prompt, 0
    for _ in range(max_new_tokens):
        # The first pass computes the whole prompt, later passes one token each.
        rows, length = tokens.shape
        positions = torch.arange(position, position + length, device=tokens.device).expand(rows, length)
        hidden_TBD = model.hidden_states(tokens, positions, caches=caches)
        logits = linear(hidden_TBD[-1], model.head_weight)[:, :vocab_size]
        drawn = sample_token(logits, temperature, top_p, generator)
        yield drawn
        tokens, position = drawn[:, None], position + length


def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    eod_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Prompt and continuation of each row, without its end-of-document token. Arguments as in `stream_tokens`."""
    rows = prompt.tolist()
    open_rows = set(range(len(rows)))
    drawn = stream_tokens(
        model,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
        vocab_size=vocab_size,
    )
    for tokens in drawn:
        # Finished rows continue in the batch; their tokens are ignored.
        for row in list(open_rows):
            token = int(tokens[row])
            if token == eod_id:
                open_rows.remove(row)
            else:
                rows[row].append(token)
        if not open_rows:
            break
    return rows


def stream_text(decode: Callable[[list[int]], str], prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that tokens add to a prompt, in pieces of whole characters, as the tokens arrive.

    The text of a token depends on the previous one: some tokenizers write a space before each word except the first,
    and a character may span several tokens. Each piece is therefore the difference between two decoded texts that both
    start slightly earlier (as in text-generation-inference). The pieces concatenate to decode(prompt + tokens) without
    the text of the prompt.

    Args:
        decode: Maps tokens to text; incomplete characters become U+FFFD.
        prompt: Preceding tokens.
        tokens: New tokens.
    """
    # The decoded window starts one piece before the text that is still to be yielded.
    window, known = list(prompt), len(prompt)
    before = text = decode(window)
    for token in tokens:
        window.append(token)
        text = decode(window)
        # An incomplete character waits for its remaining bytes.
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            window = window[known:]
            known = len(window)
            before = text = decode(window)
    # Yield bytes that never became a character as U+FFFD.
    if len(text) > len(before):
        yield text[len(before) :]
