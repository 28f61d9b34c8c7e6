"""DyLoRA: what a drawn rank does, against NumPy in the arithmetic of the official code, who draws it,
and what is left at each rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import lowrank_jax as lrx

A = lrx.adapters
N, M, RANK, ALPHA = 6, 5, 4, 6.0
KEY = jax.random.key(3)
VIEWS = lrx.Views(stacked=("stack",))
GENERATOR = np.random.default_rng(0)
PARAMS = {
    "one": jnp.asarray(GENERATOR.normal(size=(N, M)), jnp.float32),
    "stack": jnp.asarray(GENERATOR.normal(size=(3, N, M)), jnp.float32),
}
X = jnp.asarray(GENERATOR.normal(size=(7, N)), jnp.float32)
dylora = functools.partial(A.dylora, rank=RANK, alpha=ALPHA)


def made(adapter, **options):
    """An adaptation away from its start, and everything as float64 of the one matrix."""
    adaptation = lrx.adapt(PARAMS, {".*": adapter}, KEY, views=VIEWS, **options)
    generator = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(generator.normal(size=x.shape), jnp.float32)  # noqa: E731
    return adaptation.replace(train=jax.tree.map(draw, adaptation.train))


def outputs(adaptation, key=None):
    tree = lrx.attach(PARAMS, adaptation, key=key)
    layer = lambda number: jax.tree.map(lambda leaf: leaf[number], tree["stack"])  # noqa: E731
    return [lrx.matmul(X, kernel) for kernel in (tree["one"], *map(layer, range(3)))]


def factors64(adaptation, layer=None):
    own = adaptation.train["sites"]["one" if layer is None else "stack"]
    a, b = (
        np.asarray(own[name] if layer is None else own[name][layer], np.float64) for name in "ab"
    )
    return a, b


def official(a, b, rank, scaled_by, rank_stabilized=False):
    """`(x A↓b) B↓b` as the official code has it: both factors times sqrt(r / b), alpha / r outside."""
    each = np.sqrt(RANK / rank) if scaled_by == "drawn" else 1.0
    if rank_stabilized:
        return ALPHA / np.sqrt(RANK) * np.sqrt(each) * a[:, :rank] @ (np.sqrt(each) * b[:rank])
    return ALPHA / RANK * (each * a[:, :rank]) @ (each * b[:rank])


def rank_of(y, adaptation, scaled_by="drawn", rank_stabilized=False, layer=None):
    """The rank at which the reference gives the output of the leaf "one", or of a layer."""
    a, b = factors64(adaptation, layer)
    base = np.asarray(PARAMS["one"] if layer is None else PARAMS["stack"][layer], np.float64)
    fits = [
        rank
        for rank in range(1, RANK + 1)
        if np.allclose(X @ (base + official(a, b, rank, scaled_by, rank_stabilized)), y, atol=1e-4)
    ]
    assert len(fits) == 1
    return fits[0]


@pytest.mark.parametrize("scaled_by", ["drawn", "largest"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_step_is_that_of_the_official_code_at_a_drawn_rank(scaled_by, rank_stabilized):
    adaptation = made(dylora(scaled_by=scaled_by, rank_stabilized=rank_stabilized))
    run = jax.jit(lambda key: outputs(adaptation, key)[0])
    ranks = [
        rank_of(run(jax.random.key(seed)), adaptation, scaled_by, rank_stabilized)
        for seed in range(20)
    ]
    assert set(ranks) == {1, 2, 3, 4}
    assert run._cache_size() == 1  # the rank is data
    plain = outputs(adaptation)[0]
    assert rank_of(plain, adaptation, scaled_by, rank_stabilized) == RANK


@pytest.mark.parametrize("updates", ["first", "last"])
def test_the_drawn_components_alone_train(updates):
    adaptation = made(dylora(updates=updates))
    change = np.random.default_rng(5).normal(size=(7, M))

    @jax.jit
    def gradient(train, key):
        y = outputs(adaptation.replace(train=train), key)[0]
        return jnp.sum(y * jnp.asarray(change, jnp.float32)), y

    for seed in range(8):
        found, y = jax.grad(gradient, has_aux=True)(adaptation.train, jax.random.key(seed))
        own = found["sites"]["one"]
        rank, (a, b) = rank_of(y, adaptation), factors64(adaptation)
        through = np.asarray(X, np.float64).T @ change
        wanted = {"a": ALPHA / rank * through @ b.T, "b": ALPHA / rank * a.T @ through}
        train = np.arange(RANK) < rank if updates == "first" else np.arange(RANK) == rank - 1
        np.testing.assert_allclose(own["a"], wanted["a"] * train, atol=1e-4)
        np.testing.assert_allclose(own["b"], wanted["b"] * train[:, None], atol=1e-4)


@pytest.mark.parametrize("draw", ["step", "site"])
def test_all_layers_act_at_one_rank_or_each_at_its_own(draw):
    adaptation = made(dylora(draw=draw))
    run = jax.jit(lambda key: outputs(adaptation, key))
    together = []
    for seed in range(6):
        found = zip(run(jax.random.key(seed)), (None, 0, 1, 2), strict=True)
        together.append(len({rank_of(y, adaptation, layer=layer) for y, layer in found}) == 1)
    assert all(together) if draw == "step" else not all(together)


def drawn_ranks(adaptation, key):
    """The rank at every site and layer, `(matrices,)`."""
    found = []
    for node in lrx.attach(PARAMS, adaptation, key=key).values():
        (bound,) = node.bound
        own = bound.adapter
        pick = lambda keys, own=own: (  # noqa: E731
            keys[..., 1]
            if own.common_draw
            else jax.vmap(jax.random.split)(jnp.atleast_1d(keys))[..., 1]
        )
        keys, scale = jnp.atleast_1d(pick(bound.keys)), bound.arrays["scale"]
        found += list(jax.vmap(own.drawn_rank)(keys, scale.reshape(-1, scale.shape[-1])))
    return jnp.stack(found)


@pytest.mark.parametrize("draw", ["step", "site"])
def test_ranks_are_uniform_and_one_for_all_or_one_for_each(draw):
    adaptation = made(dylora(draw=draw, smallest=2))
    keys = jax.random.split(jax.random.key(9), 3000)
    ranks = np.asarray(jax.jit(jax.vmap(lambda key: drawn_ranks(adaptation, key)))(keys))
    together = (ranks == ranks[:, :1]).all(axis=1)
    assert together.all() if draw == "step" else not together.all()
    for column in ranks.T:
        counts = np.bincount(column, minlength=RANK + 1)
        assert not counts[:2].any()
        assert scipy.stats.chisquare(counts[2:]).pvalue > 1e-3
    if draw == "site":
        assert abs(np.corrcoef(ranks.T)[0, 1]) < 0.1


@pytest.mark.slow
def test_padded_matrices_draw_from_their_own_ranks():
    adaptation = made(dylora(draw="site"), ranks={"stack": (4, 2, 1)})
    keys = jax.random.split(jax.random.key(9), 200)
    ranks = np.asarray(jax.vmap(lambda key: drawn_ranks(adaptation, key))(keys))
    assert ranks.min(axis=0).tolist() == [1, 1, 1, 1]
    assert ranks.max(axis=0).tolist() == [4, 4, 2, 1]


@pytest.mark.parametrize(
    "rank", [2, *(pytest.param(r, marks=pytest.mark.slow) for r in (1, 3, 4, 9))]
)
@pytest.mark.parametrize("scaled_by", ["drawn", "largest"])
def test_what_is_cut_off_leaves_what_was_trained_at_that_rank(rank, scaled_by):
    adaptation = made(dylora(scaled_by=scaled_by))
    cut = A.at_rank(adaptation, rank)
    own = min(rank, RANK)
    base = np.asarray(PARAMS["one"], np.float64)
    wanted = base + official(*factors64(adaptation), own, scaled_by)
    np.testing.assert_allclose(lrx.merge(PARAMS, cut)["one"], wanted, atol=1e-5)
    np.testing.assert_allclose(outputs(cut)[0], X @ wanted, atol=1e-4)
    # and it is a LoRA of that rank
    lora, report = lrx.to_lora(PARAMS, cut)
    assert {int(ranks.max()) for ranks in report.ranks.values()} == {own}
    np.testing.assert_allclose(lrx.merge(PARAMS, lora)["one"], wanted, atol=1e-5)
    assert cut.trained == 4 * own * (N + M)
    assert A.at_rank(cut, rank).layout == cut.layout  # again, and nothing changes
    # it can train on: the same functions at its own largest rank
    for y in outputs(cut, jax.random.key(1)):
        assert np.isfinite(y).all()


def test_ranks_and_alphas_of_single_matrices_are_cut_by_themselves():
    adaptation = made(
        dylora(scaled_by="largest"), ranks={"stack": (4, 2, 0)}, alphas={"stack": (8.0, 3.0, 3.0)}
    )
    cut = A.at_rank(adaptation, 3)
    scale = cut.frozen["sites"]["stack"]["scale"]
    np.testing.assert_allclose(scale, [[2.0, 2.0, 2.0], [1.5, 1.5, 0.0], [0.0, 0.0, 0.0]])
    own = dict(cut.matrices)["stack"]
    assert own.ranks == (3, 2, 0)
    np.testing.assert_allclose(own.scale(*cut.layout.by_path["stack"]), scale)
    drawn = A.at_rank(made(dylora(), ranks={"stack": (4, 2, 1)}), 3)
    np.testing.assert_allclose(drawn.frozen["sites"]["stack"]["scale"][0], [2.0, 2.0, 2.0])


@pytest.mark.slow
def test_dropout_draws_beside_the_rank():
    adapter = dylora(dropout=0.5)
    adaptation = made(adapter)
    kept = jax.vmap(lambda key: outputs(adaptation, key)[0])(jax.random.split(KEY, 4000))
    same = jax.vmap(lambda key: outputs(made(dylora()), key)[0])(jax.random.split(KEY, 4000))
    spread = np.asarray(kept).std(0) / np.sqrt(4000)
    # the same ranks, the input dropped without a bias
    assert np.abs((np.asarray(kept).mean(0) - np.asarray(same).mean(0)) / spread).max() < 5
    assert np.asarray(kept).std() > np.asarray(same).std()


def test_layers_that_hold_their_adapters_draw_for_themselves():
    import flax.linen as nn

    model = lrx.linen.WithAdapter(nn.Dense(M), dylora())
    with pytest.raises(
        ValueError, match="draws once for all layers, which no layer can.*draw='site'"
    ):
        model.init(KEY, X)
    model = lrx.linen.WithAdapter(nn.Dense(M), dylora(draw="site"))
    assert "kernel_dylora" in model.init(KEY, X)["params"]


@pytest.mark.slow
def test_candidates_must_draw_alike():
    one, two = (lrx.adapt(PARAMS, {"one": dylora(rank=r)}, KEY) for r in (2, 4))
    both = A.candidates({"one": one, "two": two})
    tree = lrx.attach(PARAMS, both, ids=jnp.zeros(7, int), key=KEY)
    assert lrx.matmul(X, tree["one"]).shape == (7, M)
    other = lrx.adapt(PARAMS, {"one": dylora(rank=2, scaled_by="largest")}, KEY)
    with pytest.raises(ValueError, match="scaled_by is 'drawn' and 'largest'"):
        A.candidates({"one": one, "other": other})


REFUSED = {
    "smallest": (lambda: dylora(smallest=5), "smallest=5 exceeds rank=4, the largest"),
    "scaled_by": (lambda: dylora(scaled_by="alpha"), "scaled_by='alpha' must be one of"),
    "updates": (lambda: dylora(updates="all"), "updates='all' must be one of"),
    "draw": (lambda: dylora(draw="layer"), "draw='layer' must be one of"),
    "init": (lambda: dylora(init="pissa"), "init='pissa': its first components alone would change"),
    "smaller": (
        lambda: A.at_rank(made(dylora(smallest=3)), 2),
        "'one': rank=2 is below smallest=3, the smallest rank that was trained",
    ),
    "none": (lambda: A.at_rank(made(dylora()), 0), "rank=0 must be a positive integer"),
    "lora": (
        lambda: A.at_rank(made(A.lora(rank=2)), 1),
        "'one': the components of Lora are in no order in which the first would stand alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()
