"""FedSVD's server step against a float64 reference of its dense products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters import federated

PARAMS = {
    "layers": {"q": {"kernel": jnp.zeros((2, 6, 5))}},
    "wide": {"kernel": jnp.zeros((3, 8))},
    "head": {"kernel": jnp.zeros((5, 3))},
}
VIEWS = lrx.Views(stacked=("layers/.*",))


def adapted(**options):
    given = {"rank": 3, "alpha": 3.0, "trains": "b"} | options
    return lrx.adapt(
        PARAMS, lrx.adapters.lora(**given), jax.random.key(0), views=VIEWS, trainable="head/.*"
    )


def drawn(server, seed):
    """A tree like the one that trains, after some training."""
    leaves, structure = jax.tree.flatten(server.train)
    generator = np.random.default_rng(seed)
    made = [jnp.asarray(generator.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, made)


def kernels(server, train):
    return lrx.effective(PARAMS, server.replace(train=train))


def reference(kernel, rank):
    """`U` and `S Vᵀ` of a dense change, by its largest entries positive."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return (u * sign)[:, :rank], (s * sign)[:rank, None] * vt[:rank]


@pytest.mark.parametrize("weights", [None, [1, 3, 0]])
def test_the_next_round_begins_with_the_mean_of_the_kernels(weights):
    """Of a stack, and of a head that is trained in full."""
    server = adapted()
    clients = [drawn(server, seed) for seed in (1, 2, 3)]
    step = lrx.adapters.fed_svd if weights is None else jax.jit(lrx.adapters.fed_svd)
    after = step(server, clients, weights)
    shares = np.ones(3) / 3 if weights is None else np.array(weights) / 4
    each = [kernels(server, client) for client in clients]
    want = jax.tree.map(
        lambda *x: sum(w * np.float64(k) for w, k in zip(shares, x, strict=True)), *each
    )
    got = lrx.effective(PARAMS, after)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)
    # and with orthonormal a, canonical in sign
    for layer in range(2):
        u, svt = reference(want["layers"]["q"]["kernel"][layer], 3)
        site = after.frozen["sites"]["layers/q/kernel"], after.train["sites"]["layers/q/kernel"]
        np.testing.assert_allclose(site[0]["a"][layer], u, atol=1e-4)
        np.testing.assert_allclose(site[1]["b"][layer], svt, atol=1e-4)
    wide = after.frozen["sites"]["wide/kernel"]["a"]
    np.testing.assert_allclose(wide.T @ wide, np.eye(3), atol=1e-5)
    # the layout is what it was, so that one compiled round serves all
    assert jax.tree.structure(after) == jax.tree.structure(server)


def test_ranks_that_differ_within_a_stack_stay():
    server = adapted(rank=2)
    scale = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    path = "layers/q/kernel"
    own = server.frozen["sites"][path] | {"scale": scale}
    frozen = server.frozen | {"sites": server.frozen["sites"] | {path: own}}
    server = server.replace(frozen=frozen)
    client = drawn(server, 1)
    after = lrx.adapters.fed_svd(server, [client])
    want, got = kernels(server, client), lrx.effective(PARAMS, after)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_a_rank_above_both_sides_leaves_zeros():
    """Files of others may hold such ranks."""
    generator = np.random.default_rng(0)
    a, b = (jnp.asarray(generator.normal(size=size), jnp.float32) for size in ((3, 5), (5, 8)))
    left, right = federated._turned(a, b, jnp.ones(5))
    assert (left.shape, right.shape) == (a.shape, b.shape)
    np.testing.assert_allclose(left @ right, a @ b, atol=1e-5)
    assert not np.any(left[:, 3:]) and not np.any(right[3:])


def test_rounds_of_clients_learn():
    """Each client sees inputs of its own, and all one kernel."""
    server, key = adapted(), jax.random.key(1)
    inputs = jax.random.normal(key, (2, 20, 3))
    truth = jnp.outer(jnp.arange(3.0), jnp.ones(8))
    tx = optax.sgd(1.0)

    def loss(train, own, x):
        made = lrx.effective(PARAMS, own.replace(train=train))["wide"]["kernel"]
        return jnp.mean(jnp.square(x @ (made - truth)))

    @jax.jit
    def round_of(own):
        def client(x):
            def step(carry, _):
                train, state = carry
                updates, state = tx.update(jax.grad(loss)(train, own, x), state)
                return (optax.apply_updates(train, updates), state), None

            return jax.lax.scan(step, (own.train, tx.init(own.train)), length=10)[0][0]

        return lrx.adapters.fed_svd(own, [client(x) for x in inputs])

    start = float(loss(server.train, server, inputs[0]))
    for _ in range(6):
        server = round_of(server)
    assert float(loss(server.train, server, inputs[0])) < 0.02 * start


@pytest.mark.parametrize(
    "options, clients, weights, message",
    [
        ({}, 0, None, "there are no clients"),
        ({}, 2, [1.0], "1 weights for 2 clients"),
        ({}, 2, [1.0, -1.0], r"fed_svd: weights=-1\.0 must be"),
        ({}, 2, [0.0, 0.0], "are all zero"),
        ({"trains": "both"}, 1, None, r"has Lora.*lrx\.adapters\.lora\(trains='b'\)"),
    ],
)
def test_what_cannot_be_is_refused(options, clients, weights, message):
    server = adapted(**options)
    with pytest.raises(ValueError, match=message):
        lrx.adapters.fed_svd(server, [server.train] * clients, weights)


def test_a_tree_of_another_adaptation_is_refused():
    with pytest.raises(ValueError, match="the tree of client 1 is not like server.train"):
        lrx.adapters.fed_svd(adapted(), [adapted().train, adapted(rank=2).train])
