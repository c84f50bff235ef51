"""Text that a model writes: tokens drawn one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swarmtrain.model.key_value_cache import KeyValueCache
from swarmtrain.model.language_model import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    num_tokens: int,
    temperature: float,
    seed: int,
    goes_on: Callable[[int], bool] = lambda token: True,
) -> list[int]:
    """Return `num_tokens` tokens that continue the prompt, each drawn given the last `context_tokens`; fewer if
    `goes_on`, which is called with each, returns False.

    While all of them fit the context, each is computed alone, after the others' keys and values; later the context
    moves, and with it every position in it. Temperature 0 takes the likeliest token. The same arguments give the same
    tokens on one machine. Raises ValueError when the prompt is empty or has an unknown token, or the temperature is
    negative.
    """
    vocabulary_size, context_tokens = model.vocabulary_size, model.context_tokens
    if not prompt_tokens or not all(0 <= token < vocabulary_size for token in prompt_tokens):
        raise ValueError(f"the prompt must hold at least one token, each below {vocabulary_size}")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    tokens, cache = list(prompt_tokens), KeyValueCache()
    num_new = len(tokens[-context_tokens:])
    for _ in range(num_tokens):
        if cache.num_tokens + num_new > context_tokens:
            cache, num_new = KeyValueCache(), context_tokens
        logits = model.next_logits(torch.tensor([tokens[-num_new:]], device=model.device), cache).float().cpu()
        num_new = 1
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        if not goes_on(tokens[-1]):
            break
    return tokens[len(prompt_tokens) :]
