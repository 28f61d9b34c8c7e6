"""Optimizers on pairs: every option, errors, dtypes, optax's wrappers, and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.optim import pair_optimizers as A
from lowrank_jax.optim import pairs
from tests.adapters.pair_methods import (
    METHODS,
    SCALE,
    build,
    every,
    gradients,
    params_like,
    preconditioned,
)
from tests.laws.methods import assert_close, at, eager, same

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation


def first(tx, grads=None, params=None, **extra):
    """The updates of the first step."""
    params = params_like() if params is None else params
    grads = at(gradients(), 0) if grads is None else grads
    return eager(lambda g, s, p: tx.update(g, s, p, **extra), grads, tx.init(params), params)[0]


def last(tx, steps=3):
    params = params_like()
    state = tx.init(params)
    for step in range(steps):
        updates, state = eager(tx.update, at(gradients(), step), state, params)
        params = optax.apply_updates(params, updates)
    return params


@every
def test_other_leaves_take_adamw(name):
    when_post = name in (
        "scaled_adamw",
        "scaled_adamw sequential",
        "altlora both",
        "altlora_plus official",
    )
    eps, convention = (1e-6, "hf") if "adamw" in name else (1e-8, "torch")
    adam = lrx.inner.adam(eps=eps, convention=convention)
    final = lrx.apply_learning_rate(0.1, 0.1, decay="after" if when_post else "before")
    leaf = lambda tree: tree["q"]["kernel"]["magnitude"]  # noqa: E731
    params, state, rate = leaf(params_like()), adam.init(leaf(params_like())), final.init(None)
    for step in range(3):
        direction, scale, state = adam.update(leaf(at(gradients(), step)), state)
        updates, rate = final.update(scale * direction, rate, params)
        params = params + updates
    np.testing.assert_allclose(leaf(last(build(name))), params, rtol=1e-4, atol=1e-5)


@every
def test_common_options(name):
    plain = first(build(name, plain=optax.identity(), weight_decay=0.0))
    magnitude = at(gradients(), 0)["q"]["kernel"]["magnitude"]
    np.testing.assert_allclose(plain["q"]["kernel"]["magnitude"], -0.1 * magnitude, rtol=1e-5)
    only = jax.tree.map(lambda _: False, params_like())
    only["q"]["kernel"]["a"] = True
    for mask in (only, lambda _: only):
        got, none, full = (
            first(build(name, **o)) for o in ({"mask": mask}, {"weight_decay": 0.0}, {})
        )
        assert same(got["q"]["kernel"]["a"], full["q"]["kernel"]["a"])
        assert same(got["q"]["kernel"]["magnitude"], none["q"]["kernel"]["magnitude"])
        assert same(got["experts"], none["experts"])
    grads = at(gradients(), 0)
    grads["q"]["kernel"]["magnitude"] = grads["q"]["kernel"]["magnitude"].at[0].set(jnp.nan)
    updates = first(build(name, guard=False), grads)
    assert np.isnan(updates["q"]["kernel"]["magnitude"][0])
    assert np.all(np.isfinite(updates["experts"]["a"]))


def test_lora_plus_rates():
    params = params_like()
    ratios = ((".*/magnitude", 4.0), ("experts/b", 0.5))
    one, some = (
        first(A.lora_plus(0.1, ratio=1.0)),
        first(A.lora_plus(0.1, ratio=8.0, ratios=ratios)),
    )
    rates = {"experts": {"a": 1, "b": 0.5}, "q": {"kernel": {"a": 1, "b": 8, "magnitude": 4}}}
    assert_close(some, jax.tree.map(lambda rate, u: rate * u, rates, one))
    sign = first(A.lora_plus(0.1, inner=optax.scale_by_sign()))
    assert_close(sign["q"]["kernel"]["b"], -1.6 * jnp.sign(at(gradients(), 0)["q"]["kernel"]["b"]))
    weighted = lrx.inner.from_optax(optax.add_decayed_weights(1.0), params=True)
    assert_close(
        first(A.lora_plus(1.0, ratio=1.0, inner=weighted))["experts"]["a"],
        -at(gradients(), 0)["experts"]["a"] - params["experts"]["a"],
    )


def test_lora_plus_of_a_single_factor():
    """LoRA-FA: a is frozen, so only b is in the tree."""
    params = {"q": {"b": jnp.ones((2, 5))}}
    updates = first(A.lora_plus(0.1), params, params)
    np.testing.assert_allclose(updates["q"]["b"], -1.6, rtol=1e-5)


@preconditioned
def test_scale(name):
    """A number, an array, a tree that ends in values or in mappings, and the extra argument are one
    thing."""
    like = {"experts": 2.0, "q": {"kernel": jnp.array([2.0, 2.0])}}
    expected = first(build(name, scale=2.0))
    for scale in (np.float32(2), jnp.full((2, 3, 1), 2.0), like):
        if np.ndim(scale) == 3:
            tx = build(name, scale={"experts": scale, "q": {"kernel": 2.0}})
        else:
            tx = build(name, scale=scale)
        assert_close(first(tx), expected, 1e-4)
    assert_close(first(build(name, scale=5.0), scale=like), expected, 1e-4)


def test_precondition_pairs_is_the_joint_gradient_of_scaled_adamw():
    adam = optax.scale_by_adam(eps=1e-30)
    chained = optax.chain(
        A.precondition_pairs(scale=SCALE, damping=1e-2), adam, optax.scale_by_learning_rate(0.1)
    )
    assert_close(
        last(chained), last(A.scaled_adamw(0.1, scale=SCALE, damping=1e-2, eps=1e-30)), 1e-4
    )
    with pytest.raises(ValueError, match="damping=-1 must be a finite number of at least 0"):
        A.precondition_pairs(damping=-1)
    with pytest.raises(ValueError, match="needs params"):
        A.precondition_pairs().update(params_like(), optax.EmptyState())


def test_a_moment_that_overflows_skips_the_step_too():
    """The gradient is finite; its least-squares step through a tiny partner has no finite
    square."""
    params = {"a": jnp.ones((4, 2)), "b": 1e-8 * jnp.eye(2, 5)}
    tx = A.altlora_plus(0.1, scale=1.0, damping=0.0)
    updates, state = eager(
        tx.update, {"a": 1e6 * jnp.ones((4, 2)), "b": jnp.zeros((2, 5))}, tx.init(params), params
    )
    assert int(state.skipped) == 1 and not np.any(updates["a"])
    assert same(state._replace(skipped=state.step), tx.init(params))


PRECONDITIONED = [name for name in METHODS if name != "lora_plus"]
PAIR = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 5))}
AT_INIT = [
    (PRECONDITIONED, {"q": {"b": jnp.ones((2, 5))}}, "'q' holds 'b' and no 'a'.*LoRA-FA"),
    (
        PRECONDITIONED,
        {"q": {"a": jnp.ones((4, 2)), "b": optax.MaskedNode()}},
        "'q' holds 'a' and no 'b'.*partition",
    ),
    (
        PRECONDITIONED,
        {"q": PAIR, "v": {"a": jnp.ones((4, 2)), "b": jnp.ones(5)}},
        "'v' holds 'a' and no 'b'",
    ),
    (
        METHODS,
        {"q": PAIR | {"b": jnp.ones((3, 5))}},
        r"'q' holds a of shape \(4, 2\) and b of shape \(3, 5\)",
    ),
    (
        METHODS,
        {"q": {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((2, 5))}},
        "are no pair.*optax.partition",
    ),
    (
        METHODS,
        {"q": {"kernel": jnp.ones((4, 5)), "b": jnp.ones(5)}},
        r"none of the 2 leaves \(q/b, q/kernel.*adamw",
    ),
]


@pytest.mark.parametrize(
    "names, params, message", AT_INIT, ids=[message[:24] for *_, message in AT_INIT]
)
def test_errors_at_init(names, params, message):
    for name in names:
        with pytest.raises(ValueError, match=f"(?s)^{METHODS[name].func.__name__}: .*{message}"):
            METHODS[name](0.1).init(params)


def test_errors_of_values():
    for build_one, message in (
        (
            lambda: A.altlora(0.1, scale=1.0, alternate=0),
            "alternate=0 must be an integer of at least 1, or None",
        ),
        (
            lambda: A.altlora(0.1, scale=1.0, damping=-1.0),
            "damping=-1.0 must be a finite number of at least 0",
        ),
        (
            lambda: A.altlora(0.1, scale=1.0, bias_correction="both"),
            "bias_correction='both' must be one of",
        ),
        (lambda: A.altlora(0.1, scale=1.0, b1=1.0), "b1=1.0 must be a finite number"),
        (lambda: A.altlora(0.1, scale=1.0, decay="now"), "decay='now' must be one of"),
        (
            lambda: A.altlora_plus(0.1, scale=1.0, transport="moved"),
            "transport='moved' must be one of",
        ),
        (lambda: A.altlora_plus(0.1, scale=1.0, transport=None), "scaled_adamw moves no momentum"),
        (lambda: A.scaled_adamw(0.1, order="both"), "order='both' must be 'joint' or 'sequential'"),
        (lambda: A.lora_plus(0.1, ratio=-1.0), "ratio=-1.0 must be a finite number of at least 0"),
        (
            lambda: A.lora_plus(0.1, weight_decay=-1.0),
            "weight_decay=-1.0 must be a finite number of at least 0",
        ),
        (
            lambda: A.lora_plus(0.1, ratios=(("v/.*", 2.0),)).init({"q": PAIR}),
            "'v/.*' is the first match of no leaf",
        ),
        (
            lambda: first(A.altlora(0.1, scale={"v": 1.0}), {"q": PAIR}, {"q": PAIR}),
            "no 'q' on the way to the pair",
        ),
        (
            lambda: first(A.altlora(0.1, scale=np.ones(3)), {"q": PAIR}, {"q": PAIR}),
            r"shape \(3,\) at the pair 'q'",
        ),
        (lambda: A.altlora(0.1, scale=1.0).update({"q": PAIR}, None), "needs params"),
        (lambda: A.lora_plus(0.1, weight_decay=0.1).update({"q": PAIR}, None), "needs params"),
    ):
        with pytest.raises(ValueError, match=message):
            build_one()
    with pytest.raises(TypeError, match="unexpected keyword argument 'gaurd'"):
        A.lora_plus(0.1, gaurd=True)


@every
def test_a_tree_whose_leaves_are_all_masked_is_left_alone(name):
    tx, params = METHODS[name](0.1), {"q": optax.MaskedNode()}
    updates, state = tx.update(params, tx.init(params), params)
    assert updates == params
    assert int(state.skipped) == 0


@every
def test_what_is_shaped_like_the_parameters_is_mapped(name):
    """`optax.tree_utils.tree_map_params`: moments and bases; counters and steps are not."""
    tx = METHODS[name](0.1)
    state = tx.init({"q": PAIR, "bias": jnp.ones(3)})
    ones = optax.tree_utils.tree_map_params(
        tx, lambda x: 0 * x + 1, state, transform_non_params=lambda x: x - 7
    )
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(ones), strict=True):
        np.testing.assert_array_equal(
            after, before - 7 if before.ndim == 0 else np.ones(before.shape)
        )


def test_lora_plus_works_without_params():
    tx = A.lora_plus(0.1)
    assert_close(
        tx.update({"q": PAIR}, tx.init({"q": PAIR}))[0], first(tx, {"q": PAIR}, {"q": PAIR})
    )


@every
def test_gradient_dtype_may_differ_from_parameter_dtype(name):
    for param_dtype, grad_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        tx, params = build(name), params_like(param_dtype)
        grads = jax.tree.map(lambda x: x.astype(grad_dtype), at(gradients(), 0))  # noqa: B023
        state = tx.init(params)
        updates, after = eager(tx.update, grads, state, params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(param_dtype)}
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
        tolerance = 1e-5 if param_dtype == jnp.float32 else 3e-2
        assert_close(updates, first(build(name), *wide), tolerance)


@every
def test_wrappers(name):
    """masked, partition, chain, MultiSteps and inject_hyperparams give what the bare transformation
    gives."""
    params, grads = params_like(), gradients()
    scale = {} if name == "lora_plus" else {"scale": 2.0}
    tx = build(name, **scale)
    want = first(tx)
    labels = {
        "experts": "pairs",
        "q": {"kernel": {"a": "pairs", "b": "pairs", "magnitude": "plain"}},
    }
    both = first(optax.partition({"pairs": tx, "plain": optax.sgd(0.5)}, labels))
    assert_close(both["q"]["kernel"]["magnitude"], -0.5 * at(grads, 0)["q"]["kernel"]["magnitude"])
    assert_close(
        (both["experts"], both["q"]["kernel"]["b"]), (want["experts"], want["q"]["kernel"]["b"])
    )
    masked = first(optax.masked(tx, {"experts": False, "q": True}))
    assert same(masked["experts"], at(grads, 0)["experts"])
    assert_close(masked["q"], want["q"])
    assert_close(first(optax.chain(optax.clip_by_global_norm(1e9), tx)), want)

    wrapped = optax.MultiSteps(tx, 2).gradient_transformation()
    state = wrapped.init(params)
    twice = jax.tree.map(lambda x: 2 * x, at(grads, 0))
    updates, state = eager(wrapped.update, jax.tree.map(jnp.zeros_like, params), state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    updates, state = eager(wrapped.update, twice, state, params)
    assert_close(updates, want, 1e-4)
    assert int(state.inner_opt_state.step) == 1


@every
def test_inject_hyperparams(name):
    """On bf16 parameters with float32 hyper-parameters; a mask that is a function is static."""
    factory, given = METHODS[name].func, dict(METHODS[name].keywords)
    mask = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    given |= {"learning_rate": 0.1, "weight_decay": 0.1, "mask": mask}
    inject = optax.inject_hyperparams(factory, static_args=("mask",), hyperparam_dtype=jnp.float32)
    tx = inject(**given)
    params, grads = params_like(jnp.bfloat16), at(gradients(), 0)
    state = tx.init(params)
    updates, after = eager(tx.update, grads, state, params)
    bare = factory(**given)
    assert_close(updates, eager(bare.update, grads, bare.init(params), params)[0], 1e-2)
    stopped = optax.tree_utils.tree_set(after, learning_rate=jnp.float32(0))
    updates, _ = eager(tx.update, grads, stopped, params)
    assert not any(np.any(np.asarray(x, np.float32)) for x in jax.tree.leaves(updates))


def test_pairs_in_boxes_and_frozen_mappings():
    """Flax's boxes of metadata and frozen dicts are mappings too."""
    import flax.linen as nn
    from flax.core import freeze

    box = lambda x: nn.Partitioned(x, names=(None, None))  # noqa: E731
    want = first(A.altlora_plus(0.1, scale=2.0), {"q": PAIR}, {"q": PAIR})
    for params in (freeze({"q": PAIR}), {"q": {key: box(x) for key, x in PAIR.items()}}):
        factors = pairs.find_factors(params, "altlora")
        assert factors.paths == ("q/a", "q/b") and factors.pairs[0].path == "q"
        got = first(A.altlora_plus(0.1, scale=freeze({"q": {"scale": 2.0}})), params, params)
        assert same(jax.tree.leaves(got), jax.tree.leaves(want))


@pytest.mark.multi_device
@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
@pytest.mark.parametrize("name", ["altlora_plus", "scaled_adamw sequential"])
def test_meshes(name, axis_type):
    """Factors sharded along layers, n and m step as on one device, and lie like the parameters."""
    mesh = jax.make_mesh(
        (2, 4), ("layers", "model"), axis_types=(getattr(jax.sharding.AxisType, axis_type),) * 2
    )
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 8, 2), "b": (2, 2, 12)}
    specs = {"a": jax.P("layers", "model", None), "b": jax.P("layers", None, "model")}

    def draw():
        return {
            key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()
        }

    def place(tree):
        return {
            key: jax.device_put(x, jax.NamedSharding(mesh, specs[key])) for key, x in tree.items()
        }

    params, grads = draw(), [draw() for _ in range(3)]
    tx = build(name, scale=np.array([[2.0, 1.0], [0.5, 1.0]]))
    one, many = (params, tx.init(params)), place(params)
    shardings = lrx.state_shardings(tx, many)
    many = (many, jax.jit(tx.init, out_shardings=shardings)(many))
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = tx.update(grad, one[1], one[0])
        one = (optax.apply_updates(one[0], updates), state)
        updates, state = update(place(grad), many[1], many[0])
        many = (optax.apply_updates(many[0], updates), state)
    assert_close(many[0], one[0], 1e-4)
    assert many[1].a.mu["a"].sharding.spec == specs["a"]
    assert shardings.b.mu["b"].spec == specs["b"]


def test_the_trees_of_an_adaptation():
    """`adaptation.train` is the parameters, `adaptation.frozen` the scale: ranks 2 and 1 in one
    stack, a whole head."""
    params = {
        "layers": {"q": {"kernel": jnp.zeros((2, 6, 5))}},
        "head": {"kernel": jnp.zeros((5, 3))},
    }
    path = "layers/q/kernel"
    adaptation = lrx.adapt(
        params,
        {path: lrx.adapters.lora(rank=2, alpha=3)},
        jax.random.key(0),
        ranks={path: (2, 1)},
        views=lrx.Views(stacked=("layers/.*",)),
        trainable="head/.*",
    )
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), adaptation.train)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)

    def kernels(train):
        return lrx.effective(params, adaptation.replace(train=train))

    def loss(train):
        return sum(
            jnp.sum(g * k)
            for g, k in zip(*map(jax.tree.leaves, (gradient, kernels(train))), strict=True)
        )

    tx = A.altlora(0.1, scale=adaptation.frozen, b1=0.0, damping=0.0, plain=optax.identity())
    updates, _ = tx.update(jax.grad(loss)(train), tx.init(train), train)
    moved = jax.tree.map(
        lambda x, y: x - y, kernels(optax.apply_updates(train, updates)), kernels(train)
    )
    for layer, rank in enumerate((2, 1)):
        b = np.asarray(train["sites"][path]["b"][layer, :rank])
        want = -0.1 * np.asarray(gradient["layers"]["q"]["kernel"][layer]) @ np.linalg.pinv(b) @ b
        np.testing.assert_allclose(moved["layers"]["q"]["kernel"][layer], want, atol=1e-5)
    np.testing.assert_allclose(
        moved["head"]["kernel"], -0.1 * gradient["head"]["kernel"], atol=1e-6
    )
    assert not np.any(updates["sites"][path]["a"][1, :, 1])
