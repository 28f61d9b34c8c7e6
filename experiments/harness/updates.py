"""The pure functions of a run: loss, update and evaluation."""

import math

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lrx
from experiments.harness import optimizers
from experiments.models import llama
from lowrank_jax import sharding


def loss_sums(model, params, batch):
    """(sum_i w_i loss_i, sum_i w_i) over the tokens of a batch.

    The batch has "inputs", "targets" and "weights", all (B, S).
    """
    logits = model.apply({"params": params}, batch["inputs"])
    _, parts = llama.loss_and_metrics(logits, batch["targets"], batch["weights"])
    return parts["loss_sum"], parts["weight_sum"]


def projected_loss(sums, frozen=()):
    """`loss(params, batch, share)`: the share of a batch's summed losses."""
    return lambda params, batch, share: sums(params, batch, {}, *frozen)[0] * share


def fused(sums, optimizer, accumulation: int, backprop: str):
    """`step` by `lowrank_jax.train_step`: gradients by taps, parameters written in place.

    `grad_norm` is the norm of the gradients that the step took, low-rank ones where they are
    projected.
    """

    def update(state, batch, *frozen):
        step = lrx.train_step(
            projected_loss(sums, frozen),
            optimizer,
            accumulate=accumulation,
            with_norm=True,
            backprop=backprop,
        )
        weight = jnp.maximum(jnp.sum(batch["weights"].astype(jnp.float32)), 1.0)
        # `lrx.train_step` averages over microbatches; with these shares the average is the exact
        # token mean
        share = accumulation / weight
        if accumulation > 1:
            batch, share = microbatches(batch, accumulation), jnp.full(accumulation, share)
        params, opt_state, (loss, norm) = step(state["params"], state["opt_state"], batch, share)
        measured = {"loss": loss, "grad_norm": norm, "tokens": weight}
        measured["skipped"] = jnp.asarray(optimizers.skipped(opt_state), jnp.int32)
        return {"params": params, "opt_state": opt_state}, measured

    return update


def microbatches(batch, accumulation: int):
    """Microbatch a takes rows a, a + A, a + 2A, ..., so that each device keeps its own rows."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch
    )


def step(sums, optimizer, accumulation: int):
    """The update `(state, batch, *frozen) -> (state, metrics)`.

    The gradient is that of the exact mean over the whole batch, sum_i w_i loss_i / sum_i w_i:
    microbatch sums are added in float32 and divided once.

    Args:
      sums: `(params, batch, rest, *frozen) -> (sum_i w_i loss_i, sum_i w_i)`. `rest` is what the
        state holds besides "params" and "opt_state", unchanged by the update, but for "key": the
        state's is split once an update, and each microbatch sees a key of its own.
    """

    def update(state, batch, *frozen):
        params = state["params"]
        rest = {name: value for name, value in state.items() if name not in ("params", "opt_state")}
        # a key for each microbatch, and one that stays for the next update
        after, keys = rest, {}
        if "key" in rest:
            key, own = jax.random.split(rest["key"])
            after, keys = rest | {"key": key}, {"key": jax.random.split(own, accumulation)}

        def gradient_sum(part, keys):
            loss = lambda params: sums(params, part, rest | keys, *frozen)  # noqa: E731
            (loss, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda g: g.astype(jnp.float32), (loss, weight, grads))

        first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        if accumulation == 1:
            loss, weight, grads = gradient_sum(batch, first(keys))
        else:
            parts = microbatches(batch, accumulation)
            shapes = jax.eval_shape(gradient_sum, first(parts), first(keys))
            zeros = jax.tree.map(sharding.zeros_like, shapes)
            total, _ = jax.lax.scan(
                lambda sums, part: (optax.tree.add(sums, gradient_sum(*part)), None),
                zeros,
                (parts, keys),
            )
            loss, weight, grads = total
        # the exact token mean: sums over all microbatches, divided once
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params)
        # the scale of adapters, for optimizers of their factors
        extra = {"scale": rest["fixed"]} if "fixed" in rest else {}
        moves, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state["opt_state"], params, **extra
        )
        measured = {"loss": loss / weight, "grad_norm": optax.tree.norm(grads), "tokens": weight}
        measured["skipped"] = jnp.asarray(optimizers.skipped(opt_state), jnp.int32)
        return after | {
            "params": optax.apply_updates(params, moves),
            "opt_state": opt_state,
        }, measured

    return update


def train_step(model, optimizer, accumulation: int):
    """`step` for a language model; the state is {"params", "opt_state"}."""
    return step(
        lambda params, batch, rest: loss_sums(model, params, batch), optimizer, accumulation
    )


def fused_step(model, optimizer, accumulation: int, backprop: str):
    """`fused` for a language model."""
    return fused(
        lambda params, batch, rest: loss_sums(model, params, batch),
        optimizer,
        accumulation,
        backprop,
    )


def evaluate(step_function, params, batches) -> dict:
    """Exact token mean and its perplexity, and the number the GaLore-descended scripts print.

    Those scripts add the mean losses of the batches and divide by (batches + 1);
    `script_perplexity` is the exponential of that.

    Args:
      step_function: `(params, batch) -> (sum of losses, sum of weights)`.
    """
    total, weight, means = 0.0, 0.0, []
    for batch in batches:
        loss, tokens = (float(x) for x in step_function(params, batch))
        total, weight = total + loss, weight + tokens
        means.append(loss / max(tokens, 1.0))
    loss = total / max(weight, 1.0)
    script = sum(means) / (len(means) + 1)
    exp = lambda x: math.exp(min(x, 700.0))  # noqa: E731 - beyond 700 a double overflows
    return {
        "loss": loss,
        "perplexity": exp(loss),
        "script_perplexity": exp(script),
        "tokens": int(weight),
    }
