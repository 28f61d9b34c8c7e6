"""Optimizers on the two factors of an adapter: LoRA+, scaled AdamW, AltLoRA and AltLoRA+.

They take any tree of trained adapter parameters. A mapping with leaves `a (..., n, r)` and
`b (..., r, m)` is a pair, its delta `a diag(scale) b` (the papers write the transpose: their A is
our aᵀ, their B our bᵀ); leading axes are layers or experts, each a pair of its own. All other
leaves (magnitudes, biases, modules trained in full) take AdamW's step with the same learning rate,
schedule and decay, at every step. A tree without a pair is an error. A step whose gradients,
updates or moments are not finite, or whose gradients have a norm above 2^40, changes nothing but
`skipped`.

What the learning rate means differs: AdamW, LoRA+, scaled AdamW and AltLoRA+ move every entry of a
factor by about the rate; AltLoRA moves the kernel along the projected gradient, as SGD with
momentum would with that rate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import deprecations, sharding
from lowrank_jax.checks import check_floating, check_number
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import pairs
from lowrank_jax.optim.pair_update import Momentum, PairOptimizer
from lowrank_jax.optim.pairs import SIDES
from lowrank_jax.typing import Pytree, Scalar


def _transformation(config: PairOptimizer) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(config.init, config.update)


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: Scalar = 16.0,
    ratios: tuple[tuple[str, Scalar], ...] = (),
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    inner: optax.GradientTransformation | inner_lib.Inner | None = None,
    plain: optax.GradientTransformation | inner_lib.Inner | None = None,
    mask: Pytree | Callable[[Pytree], Pytree] | None = None,
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+ (Hayou et al., ICML 2024): AdamW with `ratio` times the learning rate on factors b.

    `W <- (1 - lr_W wd) W - lr_W u`, `lr_a = lr`, `lr_b = ratio lr`; Adam in its "torch" convention.
    One factor without its partner (LoRA-FA freezes a) is fine. State: two float32 moments of every
    leaf.

    Args:
      learning_rate: number or schedule, of a. The paper advises about half of what plain LoRA
        takes.
      ratio: lr_b / lr_a, the paper's lambda; about 16, more for harder tasks.
      ratios: `((pattern, factor), ...)`, factors of the learning rate of the leaves whose
        "/"-joined path a pattern matches whole; the first match wins over everything else. The
        paper speaks of factors alone and so does the default. The official code also gives `ratio`
        to biases and other vectors and 1e-6 in all to factors of embeddings:
        `((".*/bias", 16.0), ("embed/.*", 1e-6 / lr))`.
      b1, b2, eps: Adam's.
      weight_decay: before the step, with each leaf's own rate.
      inner: in place of Adam, one of `lrx.inner` or any optax transformation that does not couple
        leaves.
      plain: the inner transformation of leaves that are no factor; None for that of the factors.
      mask: which leaves decay, see `lrx.apply_learning_rate`. Under `optax.inject_hyperparams` a
        function belongs into its `static_args`.
      guard: False lets steps through that are not finite.

    >>> import jax.numpy as jnp
    >>> params = {"q": {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 6))}, "bias": jnp.zeros(6)}
    >>> tx = lora_plus(1e-3)
    >>> grads = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6))}, "bias": jnp.ones(6)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates["q"]["a"][0, 0], updates["q"]["b"][0, 0])
    -0.001 -0.016
    """
    adam = inner_lib.adam(b1=b1, b2=b2, eps=eps)
    config = PairOptimizer(
        method="lora_plus",
        learning_rate=learning_rate,
        inner=adam if inner is None else inner,
        ratio=ratio,
        ratios=ratios,
        weight_decay=weight_decay,
        plain=plain,
        mask=mask,
        guard=guard,
    )
    return _transformation(config)


def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Scalar | Pytree = 1.0,
    damping: Scalar = 1e-6,
    order: str = "joint",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    bias_correction: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    plain: optax.GradientTransformation | inner_lib.Inner | None = None,
    mask: Pytree | Callable[[Pytree], Pytree] | None = None,
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian preconditioned ("scaled") AdamW (Zhang and Pilanci, ICML 2024).

    Adam ("hf" convention) on `∇a (b̂ b̂ᵀ + damping I)⁻¹` and `(âᵀâ + damping I)⁻¹ ∇b`, then
    `W <- (1 - lr wd) W`. State: two float32 moments of every leaf.

    Args:
      learning_rate: number or schedule.
      scale: 1 in paper and code: Adam cancels a number. Ranks that differ within a stack want the
        frozen tree of the adapters, whose zeros mask what is padded; see
        `optim.pairs.scale_of`.
      damping: delta; official default 1e-6, tuned from 1e-7 to 100 in its experiments.
      order: "joint", both gradients by the factors before the step, as in the paper's equations
        (and in PEFT); or "sequential", that of b by the new a, as in the official AdamW.
      b1, b2, eps: Adam's; eps 1e-6.
      bias_correction: the official class for LLaMA-like models leaves it out, that for GPT-2 has
        it.
      weight_decay: after the step, as in the official code.
      plain, mask, guard: see `lora_plus`.

    Its preconditioner alone, for any other optimizer, is `precondition_pairs`.

    >>> import jax.numpy as jnp
    >>> params = {"q": {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 6))}}
    >>> tx = scaled_adamw(1e-3)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["q"]["a"].shape, int(state.a.count)
    ((4, 2), 1)
    """
    _check_order(order)
    config = PairOptimizer(
        method="scaled_adamw",
        learning_rate=learning_rate,
        scale=scale,
        damping=damping,
        sequential=order == "sequential",
        inner=inner_lib.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        bias_correction="both" if bias_correction else "none",
        weight_decay=weight_decay,
        decay="after",
        plain=plain,
        mask=mask,
        guard=guard,
    )
    return _transformation(config)


def _check_order(order: str) -> None:
    if order not in ("joint", "sequential"):
        raise ValueError(f"scaled_adamw: order={order!r} must be 'joint' or 'sequential'")


@deprecations.options("lrx.altlora")
def altlora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Scalar | Pytree,
    alternate: int | None = 1,
    damping: Scalar = 1e-5,
    b1: Scalar = 0.9,
    bias_correction: str = "none",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decay: str = "before",
    plain: optax.GradientTransformation | inner_lib.Inner | None = None,
    mask: Pytree | Callable[[Pytree], Pytree] | None = None,
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA (Yu et al., NeurIPS 2025): least-squares steps of one factor at a time.

    Momentum moves along to the new space of the other factor. On even steps, with `s` the scale: `g
    = s⁻² ∇a (b bᵀ)⁻¹`, `m <- b1 m b_old bᵀ (b bᵀ)⁻¹ + (1 - b1) g`, `a <- a - lr (m + wd a)`; on odd
    steps likewise b. The kernel moves by `-lr` times the projection of its gradient on the row
    space of b, or the column space of a. State of a pair: momentum and one old copy of both
    factors, float32.

    Args:
      learning_rate: number or schedule of the step, which the official code ignores. That of SGD on
        the kernel.
      scale: s = alpha / r, or a tree: the frozen one of the adapters; see
        `optim.pairs.scale_of`. The official code leaves `s⁻²` out, which `scale=1.0` does.
        Where it changes in training, `update(..., scale=)` takes it.
      alternate: steps on a factor before its partner's turn, first a: 1 in the paper, 10 with the
        official trainer's switch. None steps a and then, by the new a, b, at every step: the
        official default. A factor that waits keeps its momentum and does not decay; where b starts
        at zero, so does the step of a.
      damping: delta, added to the Gram matrices as the kernel sees them, `s² b bᵀ`; not in the
        paper, whose trainer has 1e-5 (its class 1e-3). Without it a pseudo-inverse.
      b1: decay of the momentum.
      bias_correction: "none" as in the paper, or "first" as in the code, counted by turns.
      weight_decay: gamma.
      decay: "before" the step as in the paper, or "after" it as in the code.
      plain: the inner transformation of leaves that are no factor; None for AdamW's Adam.
      mask, guard: see `lora_plus`.

    At damping 0 and factors of full rank, products `a b` do not depend on the gauge: `(a M, b M⁻¹)`
    runs the same way.

    >>> import jax.numpy as jnp
    >>> params = {"q": {"a": jnp.eye(4, 2), "b": jnp.eye(2, 6)}}
    >>> tx = altlora(1.0, scale=2.0, b1=0.0, damping=0.0)
    >>> gradient = jnp.ones((4, 6))  # of the kernel
    >>> grads = {
    ...     "q": {"a": 2 * gradient @ params["q"]["b"].T, "b": 2 * params["q"]["a"].T @ gradient}
    ... }
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> (2 * updates["q"]["a"] @ params["q"]["b"])[0].tolist()  # what b can express of -gradient
    [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    """
    config = PairOptimizer(
        method="altlora",
        learning_rate=learning_rate,
        scale=scale,
        damping=damping,
        alternate=alternate,
        inner=Momentum(b1=b1),
        bias_correction=bias_correction,
        transport="kept",
        sequential=True,
        weight_decay=weight_decay,
        decay=decay,
        plain=inner_lib.adam(b1=b1) if plain is None else plain,
        mask=mask,
        guard=guard,
    )
    return _transformation(config)


@deprecations.options("lrx.altlora_plus")
def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Scalar | Pytree,
    alternate: int | None = 1,
    damping: Scalar = 1e-5,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-4,
    bias_correction: str = "both",
    transport: str = "kept",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decay: str = "before",
    plain: optax.GradientTransformation | inner_lib.Inner | None = None,
    mask: Pytree | Callable[[Pytree], Pytree] | None = None,
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA+ (Yu et al., NeurIPS 2025): `altlora` with Adam's second moment of its steps.

    `v <- b2 v + (1 - b2) g²`, `a <- a - lr (c m / (sqrt(v) + eps) + wd a)`, with g and m as in
    `altlora`. v does not move with b, and the result depends on the gauge, as in the paper. State
    of a pair: `altlora`'s and v.

    Args:
      learning_rate, scale, alternate, damping, weight_decay, decay: see `altlora`; the rate is like
        AdamW's.
      b1, b2, eps: .9 and .999; eps 1e-4 as in the official trainer (its class 1e-6).
      bias_correction: c: "both", Adam's `sqrt(1 - b2^t) / (1 - b1^t)`; "first", `1 / (1 - b1^t)`,
        as in the official code, whose first step is 1 / sqrt(1 - b2) times as long; or "none". t
        counts turns.
      transport: "kept", the momentum that moved to the new space is what the next step moves; or
        "step" as in the official code, which moves it for the step and keeps the average that never
        moved.
      plain: the inner transformation of leaves that are no factor; None for AdamW's Adam.
      mask, guard: see `lora_plus`.

    >>> import jax.numpy as jnp
    >>> params = {"q": {"a": jnp.eye(4, 2), "b": jnp.eye(2, 6)}}
    >>> tx = altlora_plus(1e-2, scale=2.0, alternate=None, eps=0.0)
    >>> updates, state = tx.update(
    ...     {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6))}}, tx.init(params), params
    ... )
    >>> print(updates["q"]["a"][0])
    [-0.01 -0.01]
    """
    if transport is None:
        raise ValueError(
            "altlora_plus: transport=None must be 'kept' or 'step'; scaled_adamw moves no momentum"
        )
    config = PairOptimizer(
        method="altlora_plus",
        learning_rate=learning_rate,
        scale=scale,
        damping=damping,
        alternate=alternate,
        inner=inner_lib.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        bias_correction=bias_correction,
        transport=transport,
        sequential=True,
        weight_decay=weight_decay,
        decay=decay,
        plain=inner_lib.adam(b1=b1, b2=b2) if plain is None else plain,
        mask=mask,
        guard=guard,
    )
    return _transformation(config)


def precondition_pairs(
    *, scale: Scalar | Pytree = 1.0, damping: Scalar = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """The scaled gradients of all pairs, to be chained before another optimizer.

    They are `∇a (b̂ b̂ᵀ + damping I)⁻¹` and `(âᵀâ + damping I)⁻¹ ∇b`. Before `optax.sgd` it gives
    scaled gradient descent, before any other optimizer that one's Riemannian form. Other leaves
    pass as they are; there is no state, and no guard.

    Args:
      scale: see `altlora`; 1 is the paper's. With the true scale, gradients of a kernel come out,
        whatever alpha / r.
      damping: delta.

    At damping 0 and factors of full rank, gradient descent chained after it moves `a b`
    independently of the gauge.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(precondition_pairs(damping=0.0), optax.sgd(1.0))
    >>> params = {"a": 2 * jnp.eye(3, 1), "b": jnp.eye(1, 3)}
    >>> updates, _ = tx.update(
    ...     {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}, tx.init(params), params
    ... )
    >>> print(updates["a"].T, updates["b"])
    [[-1. -1. -1.]] [[-0.25 -0.25 -0.25]]
    """
    check_number("precondition_pairs: damping", damping, at_least=0)
    check_number("precondition_pairs: scale", scale)

    def init(params):
        check_floating(params, "precondition_pairs")
        pairs.find_factors(params, "precondition_pairs")
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("precondition_pairs: needs params; call update(grads, state, params)")
        del extra
        check_floating(updates, "precondition_pairs: gradients")
        with sharding.mesh_of((updates, params)):
            return _preconditioned(updates, params), state

    def _preconditioned(updates, params):
        leaves = jax.tree.leaves(params)
        grads, treedef = jax.tree.flatten(updates)
        made, found = list(grads), pairs.find_factors(params, "precondition_pairs").pairs
        scales = [pairs.scale_of(scale, pair, leaves[pair.leaf["a"]].shape) for pair in found]
        for side in SIDES:
            # the inverse Gram matrix (r, r) of the partner, seen by the kernel with its scale
            partners = pairs.partners(side, found, leaves, scales, damping)
            for pair, (_, inverse) in zip(found, partners, strict=True):
                grad = grads[pair.leaf[side]]
                scaled = pairs.times(side, grad.astype(jnp.float32), inverse)
                made[pair.leaf[side]] = scaled.astype(grad.dtype)
        return jax.tree.unflatten(treedef, made)

    return optax.GradientTransformationExtraArgs(init, update)
