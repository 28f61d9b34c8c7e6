"""What fine-tuning minimises and measures: sums over a batch, for language models and for classes.

`params` may hold adapters (`lowrank_jax.attach`) or taps. Every function returns (sum_i w_i loss_i,
sum_i w_i, sum_i w_i [right_i]), where right says that the likeliest token or class is the target.
"""

import jax.numpy as jnp

import lowrank_jax as lrx
from experiments.models import llama, vit

CLASSIFIER = "classifier"  # a head for classes that a LLaMA gets beside its own: {"kernel": (D, Y)}


def language(model, params, batch):
    """Next tokens: "inputs", "targets" and "weights", all (B, S)."""
    return _sums(model.apply({"params": params}, batch["inputs"]), batch)


def classes(model, params, batch):
    """Classes: "targets" and "weights" (B,) of images, or of texts that end at token "last"."""
    return _sums(class_logits(model, params, batch), batch)


def class_logits(model, params, batch):
    """Scores of the classes (B, Y) float32, of a `Vit` or of a `Llama` with a classifier.

    The classifier reads what the head would read at token "last".
    """
    if isinstance(model, vit.Vit):
        return model.apply({"params": params}, batch["inputs"])
    is_last_norm = lambda module, method: module.name == "norm"  # noqa: E731
    # the head's own product is dead code here, which XLA removes
    _, kept = model.apply(
        {"params": params},
        batch["inputs"],
        capture_intermediates=is_last_norm,
        mutable=["intermediates"],
    )
    x_BxSxD = kept["intermediates"]["norm"]["__call__"][0]
    is_last_BxS = jnp.arange(x_BxSxD.shape[1]) == batch["last"][:, None]
    # a sum with one term: a gather would need to know where the positions lie
    x_BxD = jnp.sum(jnp.where(is_last_BxS[..., None], x_BxSxD, 0), axis=1)
    return lrx.matmul(x_BxD, params[CLASSIFIER]["kernel"]).astype(jnp.float32)


def _sums(logits, batch):
    weights = batch["weights"].astype(jnp.float32)
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    losses = llama.token_losses(logits, batch["targets"])
    return jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights)
