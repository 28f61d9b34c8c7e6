"""Text from a trained model by recomputing a window: slow, but one program and no cache."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("model", "length", "temperature"))
def sample(model, params, prompt_tokens, length, key, temperature=1.0):
    """`length` tokens that follow `prompt_tokens`.

    Each token is drawn from softmax(logits / temperature), or is the argmax when temperature is 0.
    The window holds the last `model.config.sequence_length` tokens at most; causality makes what
    lies behind the last token irrelevant.

    Args:
      model: a module with `.config.sequence_length` and `.apply({"params": params}, tokens) ->
        logits`.
      prompt_tokens: (B, N) int32, 1 <= N <= sequence_length.
      length: number of new tokens.

    Returns:
      (B, length) int32.

    >>> from experiments.models.llama import Llama, preset
    >>> model, prompt = Llama(preset("nano", layers=1)), jnp.zeros((1, 4), jnp.int32)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), prompt)["params"]
    >>> jax.eval_shape(
    ...     lambda params: sample(model, params, prompt, 3, jax.random.key(1)), params
    ... ).shape
    (1, 3)
    """
    B, N = prompt_tokens.shape
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: give 0 (argmax) or a positive number")
    if not 1 <= N <= model.config.sequence_length:
        raise ValueError(
            f"prompt of {N} tokens: give between 1 and "
            f"sequence_length={model.config.sequence_length}"
        )
    window = min(model.config.sequence_length, N + length)
    tokens = jnp.zeros((B, window), jnp.int32).at[:, :N].set(prompt_tokens)

    def step(carry, key):
        tokens, filled = carry
        logits = model.apply({"params": params}, tokens)[:, filled - 1]
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = jax.random.categorical(key, logits / temperature)
        token = token.astype(jnp.int32)
        full = filled == window
        tokens = jnp.where(full, jnp.roll(tokens, -1, axis=1), tokens)
        position = jnp.where(full, window - 1, filled)
        return (tokens.at[:, position].set(token), position + 1), token

    _, out = jax.lax.scan(step, (tokens, jnp.asarray(N)), jax.random.split(key, length))
    return out.T
