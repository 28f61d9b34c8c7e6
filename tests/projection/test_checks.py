"""Numbers and dtypes that are refused at construction or `init`, and those of NumPy that are
taken."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

A, P = lrx.adapters, lrx.projectors
NAN = [math.nan, math.inf, np.float32("nan"), np.float64(-np.inf)]
KERNEL = {"dense": {"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)}}
PAIR = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6))}, "bias": jnp.ones(6)}

PROJECTIONS = {
    "galore": lambda rate=0.1, **options: lrx.galore(rate, rank=2, **options),
    "dct_adamw": lambda rate=0.1, **options: lrx.dct_adamw(rate, rank=2, **options),
    "frugal": lambda rate=0.1, **options: lrx.frugal(rate, rank=2, **options),
    "ldadam": lambda rate=0.1, **options: lrx.ldadam(rate, rank=2, **options),
    "apollo": lambda rate=0.1, **options: lrx.apollo(rate, rank=2, **options),
    "apollo_mini": lambda rate=0.1, **options: lrx.apollo_mini(rate, **options),
    "muon": lambda rate=0.1, **options: lrx.muon(rate, **options),
    "soap": lambda rate=0.1, **options: lrx.soap(rate, **options),
}
PAIRS = {
    "lora_plus": lrx.lora_plus,
    "scaled_adamw": lrx.scaled_adamw,
    "altlora": lambda rate, **options: lrx.altlora(rate, **({"scale": 1.0} | options)),
    "altlora_plus": lambda rate, **options: lrx.altlora_plus(rate, **({"scale": 1.0} | options)),
}
lora = functools.partial(A.lora, rank=2)
COMMON = ("rate", "weight_decay", "b1", "clip_norm")
NUMBERS = [(PROJECTIONS[name], field) for name in PROJECTIONS for field in COMMON]
NUMBERS += [
    (PROJECTIONS[name], "eps") for name in ("galore", "dct_adamw", "ldadam", "muon", "soap")
]
NUMBERS += [(PROJECTIONS[name], "scale") for name in ("galore", "apollo", "apollo_mini", "muon")]
NUMBERS += [(PROJECTIONS["frugal"], field) for field in ("active_scale", "inactive_scale")]
NUMBERS += [
    (PROJECTIONS["apollo"], "limiter"),
    (PROJECTIONS["ldadam"], "mix"),
    (PROJECTIONS["galore"], "seed"),
]
NUMBERS += [(lrx.refresh_schedules.every, "period")]
NUMBERS += [(make, field) for make in PAIRS.values() for field in ("rate", "weight_decay", "b1")]
NUMBERS += [
    (PAIRS["lora_plus"], "ratio"),
    (PAIRS["altlora"], "scale"),
    (PAIRS["altlora"], "damping"),
]
NUMBERS += [
    (lambda **o: lrx.adapters.precondition_pairs(**o), "scale"),
    (lambda **o: lrx.adapters.precondition_pairs(**o), "damping"),
]
NUMBERS += [
    (lambda **o: lrx.scale_by_projection(P.svd(rank=2), **o), field)
    for field in ("scale", "clip_norm")
]
NUMBERS += [
    (lambda rate=0.1, **o: lrx.apply_learning_rate(rate, **o), field)
    for field in ("rate", "weight_decay")
]
NUMBERS += [(lrx.inner.adam, "b2"), (lrx.residuals.sign, "scale"), (lrx.residuals.sgd, "scale")]
NUMBERS += [(make, "alpha") for make in (lora, A.loha, A.fourierft)] + [(A.vera, "initial")]


@pytest.mark.parametrize("make, field", NUMBERS, ids=range(len(NUMBERS)))
def test_a_number_that_is_not_finite_is_refused_at_construction(make, field):
    # an integer beyond the largest float is a period and a seed
    for value in NAN if field in ("period", "seed") else [*NAN, 10**400]:
        positional = [value] if field == "rate" else [0.1] if make in PAIRS.values() else []
        options = {} if field == "rate" else {field: value}
        name = "learning_rate" if field == "rate" else field
        with pytest.raises(
            ValueError, match=f"(?s){'(scale|' + name + ')'}=.*(nan|inf|000) must be"
        ):
            make(*positional, **options)


def test_a_ratio_of_a_path_is_finite():
    with pytest.raises(ValueError, match="ratios: 'q/b'=nan must be"):
        lrx.lora_plus(0.1, ratios=(("q/b", math.nan),))


def test_a_rate_given_to_the_fused_step_is_finite_too():
    form = lrx.fused(lrx.galore(0.1, rank=2))
    with pytest.raises(ValueError, match="learning_rate=nan must be a finite number"):
        form.step(KERNEL, KERNEL, form.init(KERNEL), math.nan)


@pytest.mark.parametrize("period", [2.5, math.nan])
def test_a_period_is_an_integer(period):
    with pytest.raises(ValueError, match=f"period={period} must be an integer of at least 1"):
        lrx.galore(0.1, rank=2, refresh_every=period)


def test_traced_numbers_arrays_and_schedules_pass():
    def init(rate):
        return lrx.galore(
            rate, rank=2, scale=rate, weight_decay=rate, b1=rate, clip_norm=rate
        ).init(KERNEL)

    jax.eval_shape(init, jnp.float32(0.1))
    init(jnp.float32(0.1))
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    lrx.galore(schedule, rank=2, weight_decay=schedule).init(KERNEL)
    lrx.lora_plus(schedule, weight_decay=schedule).init(PAIR)


RANKS = [
    np.int64(4),
    np.int32(4),
    np.float32(0.5),
    {"dense/.*": 4},
    {"x": 2, ".*": np.int64(4)},
    (("dense/.*", 4),),
]


@pytest.mark.parametrize("rank", RANKS, ids=repr)
def test_ranks_of_numpy_and_ranks_by_a_dict(rank):
    params = {"dense": {"kernel": jnp.ones((8, 10))}}
    for projector in (
        P.svd(rank=rank),
        P.dct(rank=rank),
        P.random(rank=rank),
        P.columns(rank=rank),
    ):
        hash(projector)
        view = lrx.explain(lrx.scale_by_projection(projector), params).projected[0]
        assert (view.rank, type(view.rank)) == (4, int)
    assert lrx.explain(lrx.galore(0.1, rank=rank), params).projected[0].rank == 4
    injected = optax.inject_hyperparams(lrx.galore, static_args=("rank",))(0.1, rank=rank)
    assert injected.init(params).inner_state.projection.matrices["dense"]["kernel"].basis.shape == (
        8,
        4,
    )


def test_integers_of_numpy_elsewhere():
    four = np.int64(4)
    assert lrx.refresh_schedules.every(period=np.int32(1)).due((), 3) is True
    assert lrx.refresh_schedules.staggered(period=four).layers_per_step(10) == 3
    assert lrx.frugal(0.1, rank=np.int64(0)).projection.projector == P.identity()
    lrx.fused(lrx.galore(0.1, rank=2), plain_block=four)
    stored = lrx.inner.stored8(block=np.int64(64), minimum=np.int64(8)).init(jnp.ones((2, 64)))
    assert stored.mu.scales.shape == (2, 1)
    assert lrx.dct_adamw(0.1, rank=2, kind=np.int64(3)).projection.projector == P.dct(
        rank=2, kind=3
    )
    adaptation = lrx.adapt(KERNEL, A.lora(rank=four), jax.random.key(0))
    assert adaptation.train["sites"]["dense/kernel"]["a"].shape == (6, 4)
    for options in ({}, {"ranks": {".*": np.int32(2)}, "alphas": {".*": np.float32(3)}}):
        _, matrices = lrx.adapt(KERNEL, A.lora(rank=four), jax.random.key(0), **options).matrices[0]
        assert {type(x) for x in (*matrices.ranks, *matrices.alphas)} <= {int, float, type(None)}
    lrx.altlora(0.1, scale=1.0, alternate=four)


LEAVES = {
    "complex64": "train its real and imaginary parts as two leaves",
    "int32": "leave it out of the parameters",
    "bool": "leave it out of the parameters",
}


@pytest.mark.parametrize("dtype", LEAVES)
@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_leaves_that_are_not_real_are_refused_by_name(dtype, leaf):
    wrong = {"dense": KERNEL["dense"] | {leaf: KERNEL["dense"][leaf].astype(dtype)}}
    message = f"leaf 'dense/{leaf}' is {dtype}, .*{LEAVES[dtype]}.*optax.partition"
    for make in PROJECTIONS.values():
        for transformation in (make(), lrx.fused(make()), optax.chain(optax.clip(1.0), make())):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(transformation.init, wrong)
    tx = lrx.scale_by_projection(P.svd(rank=2))
    for transformation in (tx, lrx.apply_learning_rate(0.1)):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(transformation.init, wrong)
    state = jax.eval_shape(tx.init, KERNEL)
    with pytest.raises(ValueError, match=f"gradients: leaf 'dense/{leaf}' is {dtype}"):
        jax.eval_shape(tx.update, wrong, state, KERNEL)


@pytest.mark.parametrize("dtype", LEAVES)
def test_pairs_that_are_not_real_are_refused_by_name(dtype):
    factor = PAIR["q"] | {"a": PAIR["q"]["a"].astype(dtype)}
    bias = PAIR["bias"].astype(dtype)
    for wrong, path in ((PAIR | {"q": factor}, "q/a"), (PAIR | {"bias": bias}, "bias")):
        for transformation in (
            *(make(0.1) for make in PAIRS.values()),
            lrx.adapters.precondition_pairs(),
        ):
            with pytest.raises(ValueError, match=f"leaf '{path}' is {dtype}"):
                jax.eval_shape(transformation.init, wrong)
            state = jax.eval_shape(transformation.init, PAIR)
            with pytest.raises(ValueError, match=f"gradients: leaf '{path}' is {dtype}"):
                jax.eval_shape(transformation.update, wrong, state, PAIR)


def test_masked_leaves_may_be_anything():
    params = KERNEL | {"step": jnp.zeros((), jnp.int32)}
    labels = {"dense": "low", "step": "fixed"}
    tx = optax.partition({"low": lrx.galore(0.1, rank=2), "fixed": optax.set_to_zero()}, labels)
    assert jax.eval_shape(tx.init, params)


def test_quantised_leaves_stand_for_real_ones():
    params = {"kernel": lrx.linalg.quantize_blocks(jnp.ones((6, 512)), "linear")}
    assert jax.eval_shape(lrx.fused(lrx.galore(0.1, rank=2)).init, params)


MASKS = [
    True,
    {"dense": True},
    {"dense": {"kernel": True, "bias": False}},
    lambda p: {"dense": {"kernel": True, "bias": False}},
]


def decayed(mask, fused, decay=0.5):
    """The parameters after a step of zero gradients: decay alone."""
    tx = lrx.galore(0.1, rank=2, weight_decay=decay, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, KERNEL)
    if fused:
        form = lrx.fused(tx)
        return form.step(KERNEL, zeros, form.init(KERNEL))[0]["dense"]
    updates, _ = tx.update(zeros, tx.init(KERNEL), KERNEL)
    return optax.apply_updates(KERNEL, updates)["dense"]


@pytest.mark.parametrize("fused", [False, True])
def test_masks_of_decay_may_be_prefixes(fused):
    for mask, bias in zip(MASKS, (0.95, 0.95, 1.0, 1.0), strict=True):
        made = decayed(mask, fused)
        np.testing.assert_allclose(made["kernel"], 0.95, rtol=1e-6)
        np.testing.assert_allclose(made["bias"], bias, rtol=1e-6)
    with pytest.raises(ValueError, match="mask: .* nor a prefix of it"):
        decayed({"dens": True}, fused)


def test_a_mask_inside_partition_and_masked():
    params = KERNEL | {"other": jnp.ones(3)}
    for mask in (
        {"dense": {"kernel": True, "bias": False}, "other": True},
        {"dense": True, "other": False},
        True,
    ):
        inner = lrx.galore(0.1, rank=2, weight_decay=0.5, mask=mask)
        tx = optax.partition(
            {"low": inner, "plain": optax.sgd(0.1)}, {"dense": "low", "other": "plain"}
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_array_equal(updates["other"], 0)


def test_decay_follows_a_schedule_of_accepted_steps_in_every_form():
    """As `optax.adamw`'s; a skipped step does not count."""
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.5})  # .5, then .25
    tx = lrx.dct_adamw(0.1, rank=2, weight_decay=schedule)
    zeros = jax.tree.map(jnp.zeros_like, KERNEL)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), KERNEL)
    expected = (1 - 0.1 * 0.5) * (1 - 0.1 * 0.25)
    form = lrx.fused(tx)
    params, state = KERNEL, tx.init(KERNEL)
    written, own = KERNEL, form.init(KERNEL)
    for grads in (zeros, bad, zeros):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        written, own = form.step(written, grads, own)
    for made in (params, written):
        for leaf in jax.tree.leaves(made):
            np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    adamw = optax.adamw(0.1, weight_decay=schedule)
    reference, its = KERNEL, adamw.init(KERNEL)
    for _ in range(2):
        updates, its = adamw.update(zeros, its, reference)
        reference = optax.apply_updates(reference, updates)
    np.testing.assert_allclose(reference["dense"]["bias"], params["dense"]["bias"], rtol=1e-6)


def test_decay_of_pairs_follows_a_schedule():
    tx = lrx.lora_plus(
        0.1,
        ratio=1.0,
        weight_decay=optax.piecewise_constant_schedule(0.5, {1: 0.5}),
        mask={"q": True, "bias": False},
    )
    params, state = PAIR, tx.init(PAIR)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, PAIR), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["q"]["a"], 0.95 * 0.975, rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], 1)


def test_an_injected_schedule_of_decay():
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.5})
    plain = lrx.galore(0.1, rank=2, weight_decay=schedule)
    injected = optax.inject_hyperparams(lrx.galore, static_args=("rank",))(
        0.1, rank=2, weight_decay=schedule
    )
    states = [plain.init(KERNEL), injected.init(KERNEL)]
    for _ in range(2):
        made = [
            tx.update(KERNEL, state, KERNEL)
            for tx, state in zip((plain, injected), states, strict=True)
        ]
        (first, second), states = (updates for updates, _ in made), [state for _, state in made]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), first, second)


@pytest.mark.slow
def test_decay_of_the_layerwise_form_follows_the_schedule_and_the_mask():
    def layer(layer, x):
        return jnp.tanh(lrx.matmul(x, layer["kernel"])) + layer["bias"]

    stack = lrx.projection.Stack(
        before=lambda rest, x: x, layer=layer, after=lambda rest, x, _: jnp.mean(x**2)
    )
    params = {"layers": {"kernel": jnp.stack([jnp.eye(4)] * 2), "bias": jnp.ones((2, 4))}}
    schedule, mask = optax.linear_schedule(0.5, 0.1, 2), {"layers": {"kernel": True, "bias": False}}
    tx = lrx.dct_adamw(
        0.1, rank=2, views=lrx.Views(stacked="layers/.*"), weight_decay=schedule, mask=mask
    )
    found = []
    for make in (lrx.layerwise_step(stack, tx), lrx.train_step(stack.loss, tx)):
        step, own, state = jax.jit(make), params, tx.init(params)
        for _ in range(2):
            own, state, _ = step(own, state, jnp.ones((3, 4)))
        found.append(own)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *found)


def test_what_is_jitted_may_hold_a_mask_of_dicts():
    """`jax.jit` hashes the callable it is given, and with it all that a dataclass's equality reads."""
    params, mask = {"kernel": jnp.ones((4, 4))}, {"kernel": True}
    tx = lrx.galore(0.1, rank=2, mask=mask)
    form = lrx.fused(tx)
    loss = lambda params, x: jnp.mean(lrx.matmul(x, params["kernel"]) ** 2)  # noqa: E731
    state = jax.jit(tx.init)(params)
    jax.jit(form.init)(params)
    jax.jit(tx.update)(params, state, params)
    jax.jit(form.step)(params, params, state)
    jax.jit(lrx.train_step(loss, form))(params, state, jnp.ones((3, 4)))
    tapped = lrx.projected_value_and_grad(loss, lrx.taps(state))
    jax.jit(tapped)(params, jnp.ones((3, 4)))
