"""Several adaptations of one base: weights, padded ranks, a choice for each row, hot-swap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters import candidate_ids, candidates, hot_swap, padded, weighted

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

VIEWS = lrx.Views(stacked=("layers/.*",))
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "layers": {"kernel": jnp.asarray(normal(0, 2, 6, 6))},
    "out": {"kernel": jnp.asarray(normal(1, 6, 4)), "bias": jnp.asarray(normal(2, 4))},
}
X = jnp.asarray(normal(3, 5, 6))


def trained(adaptation, seed):
    """The adaptation as if it had trained: random numbers in every trained array."""
    leaves, treedef = jax.tree.flatten(adaptation.train)
    return adaptation.replace(
        train=jax.tree.unflatten(
            treedef, [jnp.asarray(0.3 * normal(seed + i, *x.shape)) for i, x in enumerate(leaves)]
        )
    )


def made(rules, seed, **options):
    rules = rules if isinstance(rules, lrx.adapters.Adapter) else tuple(rules.items())
    return cached(rules, seed, tuple(options.items()))


@functools.cache
def cached(rules, seed, options):
    return trained(
        lrx.adapt(PARAMS, rules, jax.random.key(seed), views=VIEWS, **dict(options)), 100 * seed
    )


def forward(params, x):
    """Two scanned layers and an output."""
    x, _ = jax.lax.scan(
        lambda x, layer: (jnp.tanh(lrx.matmul(x, layer["kernel"])), None), x, params["layers"]
    )
    return lrx.matmul(x, params["out"]["kernel"]) + params["out"]["bias"]


@jax.jit
def out(adaptations, ids=None):
    return forward(lrx.attach(PARAMS, adaptations, ids=ids), X)


BASE = forward(PARAMS, X)
lora = functools.partial(lrx.adapters.lora, dropout=0.0)


@pytest.mark.parametrize(
    "family", [lrx.adapters.dora(rank=2), lrx.adapters.oft(block=2)], ids=lambda one: one.kind
)
def test_a_weight_of_0_is_the_base_and_one_program_serves_all(family):
    adaptation, traces = made(family, 1), []

    @jax.jit
    def run(weight):
        traces.append(weight)
        return out(weighted(adaptation, weight))

    np.testing.assert_allclose(run(0.0), BASE, atol=1e-6)
    np.testing.assert_allclose(run(1.0), out(adaptation), atol=1e-6)
    assert float(jnp.abs(run(0.5) - BASE).max()) > 1e-3
    assert len(traces) == 1


def test_weights_scale_deltas_and_nothing_else():
    adaptation = made(lora(rank=2, alpha=6), 1, trainable="out/bias")
    half = weighted(adaptation, -0.5)
    plain, found = lrx.effective(PARAMS, adaptation), lrx.effective(PARAMS, half)
    for path in ("layers", "out"):
        kernel = PARAMS[path]["kernel"]
        np.testing.assert_allclose(
            found[path]["kernel"] - kernel, -0.5 * (plain[path]["kernel"] - kernel), atol=1e-6
        )
    np.testing.assert_array_equal(found["out"]["bias"], plain["out"]["bias"])
    assert half.train is adaptation.train
    with pytest.raises(ValueError, match=r"weight: an array of shape \(2,\); give one number"):
        weighted(adaptation, jnp.ones(2))


def united(family):
    """Two adaptations of different leaves, and one of both."""
    rules = ({"layers/kernel": family}, {"out/kernel": family}, {".*/kernel": family})
    return {
        name: made(own, seed) for seed, (name, own) in enumerate(zip("abc", rules, strict=True))
    }


DIFFERENT = {
    "lora": lora(rank=2), "dora": lrx.adapters.dora(rank=2), "oft": lrx.adapters.oft(block=2),
    "hira": lrx.adapters.hira(rank=2),
    "miss": lrx.adapters.miss(rank=2), "shira": lrx.adapters.shira(rank=1),
    "fourierft": lrx.adapters.fourierft(frequencies=5),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_candidates_of_different_leaves_stand_in_one_batch(name):
    """Row by row the result of each alone, whichever comes first."""
    ones = united(DIFFERENT[name])
    for order in ("abc", "cba", "bac"):
        both = candidates({key: ones[key] for key in order})
        names = ["a", "b", "c", None, "a"]
        rows = candidate_ids(both, names)
        found = out(both, rows)
        for row, key in enumerate(names):
            want = BASE if key is None else out(ones[key])
            np.testing.assert_allclose(found[row], want[row], rtol=1e-5, atol=1e-5)
    assert both.trained == sum(one.trained for one in ones.values())
    grads = jax.jit(jax.grad(lambda train: jnp.sum(out(both.replace(train=train), rows) ** 2)))(
        both.train
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_groups_that_share_otherwise_are_refused_as_candidates():
    vera = united(lrx.adapters.vera(rank=2))
    for one, other, error in (
        (
            "a",
            "b",
            "what their groups share has shapes .* and .*; adapt the same leaves, or give leaves",
        ),
        (
            "b",
            "c",
            r"'out/kernel': the group's largest matrix is \(6, 4\) and \(6, 6\); adapt the same "
            r"leaves",
        ),
    ):
        with pytest.raises(ValueError, match=error):
            candidates({one: vera[one], other: vera[other]})


FAMILIES = {
    "lora": lora(rank=2),
    "dora": lrx.adapters.dora(rank=2),
    "vera": lrx.adapters.vera(rank=2),
    "uni_lora": lrx.adapters.uni_lora(rank=2, size=16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_arrays_and_not_the_function(name):
    adaptation = made(FAMILIES[name], 1)
    wide = padded(adaptation, 5)
    for got, want in zip(
        jax.tree.leaves(lrx.effective(PARAMS, wide)),
        jax.tree.leaves(lrx.effective(PARAMS, adaptation)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert wide.trained == adaptation.trained
    assert all(site.rank == adapter.rank == 5 for adapter, site in wide.layout.by_path.values())
    assert wide.frozen["sites"]["layers/kernel"]["scale"].shape == (2, 5)
    assert not wide.frozen["sites"]["layers/kernel"]["scale"][:, 2:].any()
    if name == "lora":
        a, b = (wide.train["sites"]["layers/kernel"][side] for side in "ab")
        assert a.shape == (2, 6, 5) and b.shape == (2, 5, 6)
        assert not a[..., 2:].any() and not b[:, 2:].any()


def test_padding_is_refused_where_it_cannot_be():
    with pytest.raises(
        ValueError,
        match=r"rank=1 is smaller than that of 'layers/kernel' \(2\), 'out/kernel' \(2\)",
    ):
        padded(made(lora(rank=2), 1), 1)
    with pytest.raises(ValueError, match="rank=0 must be a positive integer"):
        padded(made(lora(rank=2), 1), 0)
    oft = made(lrx.adapters.oft(block=2), 1)
    chex.assert_trees_all_equal_structs(padded(oft, 3), oft)

    class Silent(lrx.adapters.lora):
        def axes(self, site):
            return {}

    with pytest.raises(
        ValueError,
        match="Silent names no axis 'rank' in its `axes`, so its rank 2 cannot be padded",
    ):
        padded(made(Silent(rank=2), 1), 3)


SETS = {
    "lora": [
        lora(rank=1, alpha=3),
        lora(rank=3, alpha=8, rank_stabilized=True),
        lora(rank=2, init="gaussian"),
    ],
    "pissa": [lora(rank=1, init="pissa"), lora(rank=3, init="olora")],
    "dora": [lrx.adapters.dora(rank=1), lrx.adapters.dora(rank=2)],
    "oft": [lrx.adapters.oft(block=2), lrx.adapters.oft(block=2)],
    "uni_lora": [lrx.adapters.uni_lora(rank=2, size=16), lrx.adapters.uni_lora(rank=2, size=16)],
}


@pytest.mark.parametrize("name", SETS)
def test_each_row_takes_its_candidate_as_if_it_were_alone(name):
    where = (
        "out/kernel" if name == "uni_lora" else lrx.adapters.ALL_LINEAR
    )  # a bare scan cannot carry what is shared
    each = {f"{name} {i}": made({where: family}, i + 1) for i, family in enumerate(SETS[name])}
    both = candidates(each)
    names = [f"{name} 1", None, f"{name} 0", f"{name} 1", f"{name} {len(each) - 1}"]
    got = out(both, candidate_ids(both, names))
    alone = {None: BASE} | {key: out(one) for key, one in each.items()}
    for row, key in enumerate(names):
        np.testing.assert_allclose(got[row], alone[key][row], atol=2e-6)
    assert both.trained == sum(one.trained for one in each.values())
    assert float(jnp.abs(alone[names[0]] - alone[names[2]]).max()) > 1e-3


def test_rows_of_an_embedding_and_a_second_adaptation_beside_the_choice():
    params = {"embedding": jnp.asarray(normal(1, 9, 4))}
    make = lambda seed, rank: trained(lrx.adapt(params, {"embedding": lora(rank=rank)}, KEY), seed)  # noqa: E731
    one, two, plain = make(1, 1), make(2, 2), make(3, 2)
    ids, tokens = jnp.array([1, -1]), jnp.array([[3, 4], [5, 3]])
    attached = lrx.attach(
        params, {"plain": plain, "users": candidates({"one": one, "two": two})}, ids=ids
    )
    got = lrx.adapters.embed(tokens, attached["embedding"])
    for row, chosen in enumerate(({"plain": plain, "two": two}, {"plain": plain})):
        want = lrx.effective(params, chosen)["embedding"][tokens[row]]
        np.testing.assert_allclose(got[row], want, atol=1e-6)


def test_candidates_train_together_and_each_row_trains_its_own():
    both = candidates({"one": made(lora(rank=1), 1), "two": made(lora(rank=2), 2)})

    def loss(train):
        return jnp.sum(
            forward(
                lrx.attach(PARAMS, both.replace(train=train), ids=jnp.array([0, 0, 0, -1, -1])), X
            )
            ** 2
        )

    grads = jax.jit(jax.grad(loss))(both.train)["sites"]["layers/kernel"]["a"]
    assert grads.shape == (2, 2, 6, 2)
    assert grads[:, 0, :, 0].any()
    assert not grads[:, 0, :, 1].any() and not grads[:, 1].any()


def test_a_number_without_a_candidate_is_not_the_last_one():
    got = out(candidates({"one": made(lora(rank=1), 1)}), jnp.array([0, 1, -1, 7, 0]))
    np.testing.assert_array_equal(
        np.isnan(np.asarray(got)).any(axis=1), [False, True, False, True, False]
    )


def test_rows_drop_out_apart():
    params = {"kernel": jnp.zeros((64, 4))}
    one = trained(lrx.adapt(params, lrx.adapters.lora(rank=2, dropout=0.5), KEY), 1)
    attached = lrx.attach(params, candidates({"one": one}), ids=jnp.zeros(2, jnp.int32), key=KEY)
    first, second = lrx.matmul(jnp.ones((2, 64)), attached["kernel"])
    assert float(jnp.abs(first - second).max()) > 1e-3


def test_candidates_that_differ_in_more_than_arrays_are_refused():
    one = made(lora(rank=2), 1)
    cases = [
        (
            made(lrx.adapters.lora(rank=2, dropout=0.1), 1),
            r"'layers/kernel': dropout is 0.0 and 0.1; 'out/",
        ),
        (made(lrx.adapters.hira(rank=2), 1), "the adapter is Lora and Hira"),
        (
            made(lora(rank=2, init="pissa"), 1),
            r"arrays are \['scale'\] and \['a0', 'b0', 'scale'\]; lrx.to_lora",
        ),
        (made(lora(rank=2, trains="b"), 1), "trains is 'both' and 'b'"),
        (
            made(lora(rank=2), 1, trainable="out/bias"),
            r"'two' cannot be chosen by rows: leaves \('out/bias',\) are",
        ),
        (candidates({"x": one}), "'two' cannot be chosen by rows: it holds candidates itself"),
    ]
    for two, message in cases:
        with pytest.raises(ValueError, match=message):
            candidates({"one": one, "two": two})
    oft = [made(lrx.adapters.oft(block=block), 1) for block in (2, 3)]
    with pytest.raises(ValueError, match="block is 2 and 3"):
        candidates({"one": oft[0], "two": oft[1]})
    with pytest.raises(ValueError, match="no adaptation to choose from"):
        candidates({})


def test_a_choice_needs_ids_and_ids_a_choice():
    one = made(lora(rank=2), 1)
    both = candidates({"one": one, "two": one})
    with pytest.raises(
        ValueError, match=r"chooses among the candidates \['one', 'two'\]: pass ids="
    ):
        lrx.attach(PARAMS, both)
    for function in (lrx.effective, lrx.merge):
        with pytest.raises(ValueError, match="give one of the adaptations that they were made of"):
            function(PARAMS, both)
    with pytest.raises(
        ValueError, match="ids choose among candidates, and no active adaptation has any"
    ):
        lrx.attach(PARAMS, one, ids=jnp.array([0]))
    with pytest.raises(
        ValueError, match=r"\['three'\] are not among the candidates \('one', 'two'\)"
    ):
        candidate_ids(both, ["three"])
    with pytest.raises(ValueError, match="ids choose for 3 rows"):
        out(both, jnp.array([0, 1, 0]))


def test_hot_swap_does_not_recompile():
    traces = []

    @jax.jit
    def run(adaptation):
        traces.append(1)
        return lrx.effective(PARAMS, adaptation)

    room = padded(made(lora(rank=2), 1), 4)
    run(room)
    for rank, alpha in ((1, 3), (4, 8), (3, 1)):
        new = made(
            lora(rank=rank, alpha=alpha, rank_stabilized=rank == 3, init="gaussian"), rank + 1
        )
        swapped = hot_swap(room, new)
        found, want = run(swapped)["out"]["kernel"], lrx.effective(PARAMS, new)["out"]["kernel"]
        np.testing.assert_allclose(found, want, atol=1e-6)
        assert str(swapped) == str(room)
    assert len(traces) == 1


def test_hot_swap_turns_off_what_the_new_one_does_not_adapt_and_keeps_dtypes():
    old = made(lora(rank=2), 1)
    old = old.replace(train=jax.tree.map(lambda x: x.astype(jnp.bfloat16), old.train))
    swapped = hot_swap(old, made({"out/kernel": lora(rank=1)}, 2))
    assert {x.dtype for x in jax.tree.leaves(swapped.train)} == {jnp.bfloat16.dtype}
    chex.assert_trees_all_equal_structs(swapped, old)
    np.testing.assert_array_equal(
        lrx.effective(PARAMS, swapped)["layers"]["kernel"], PARAMS["layers"]["kernel"]
    )
    assert float(jnp.abs(out(swapped) - BASE).max()) > 1e-3


def test_hot_swap_lists_everything_that_does_not_fit():
    old = made({"out/kernel": lora(rank=2)}, 1, trainable="out/bias")
    with pytest.raises(ValueError, match="does not fit") as error:
        hot_swap(old, made(lrx.adapters.lora(rank=3, dropout=0.1), 2))
    for text in (
        "'old' does not adapt ['layers/kernel']; give it these sites",
        "'out/kernel': dropout is 0.0 and 0.1",
        "leaves ['out/bias'] are trained in full by one of them alone",
        "'out/kernel': rank 3 exceeds 2; pad the old one by lrx.adapters.padded(old, 3)",
    ):
        assert text in str(error.value)
    stacked = lrx.adapt(
        {"out": {"kernel": jnp.ones((3, 6, 4))}},
        lora(rank=2),
        KEY,
        views=lrx.Views(stacked=("out/.*",)),
    )
    with pytest.raises(ValueError, match=r"shape is \(6, 4\) and \(3, 6, 4\)"):
        hot_swap(made({"out/kernel": lora(rank=2)}, 1), stacked)


def test_hot_swap_stays_where_the_old_one_was_put():
    device = jax.devices()[0]
    old = jax.device_put(made(lora(rank=2), 1), device)
    for swapped, was in zip(
        jax.tree.leaves(hot_swap(old, made(lora(rank=1), 2))), jax.tree.leaves(old), strict=True
    ):
        assert swapped.committed and was.committed and swapped.sharding == was.sharding
