"""GaLore with Adafactor, Adam-mini and 8-bit Adam inside, against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.projection.oracles.codes import dynamic

STEPS, RATE, SCALE, RANK, EVERY, DECAY = 7, 0.02, 0.25, 3, 3, 0.1


def adafactor(b1, power, clip):
    """Directions of the official rule, of one matrix after the other gradient."""
    m = r = c = 0.0
    t = 0

    def direction(g):
        nonlocal m, r, c, t
        t += 1
        b2, squares = 1 - t**-power, g**2 + 1e-30
        r = b2 * r + (1 - b2) * squares.mean(axis=1)
        c = b2 * c + (1 - b2) * squares.mean(axis=0)
        u = g / np.sqrt(np.outer(r, c) / r.mean())
        u = u / max(1, np.sqrt((u**2).mean()) / clip)
        m = u if b1 is None else b1 * m + (1 - b1) * u
        return m

    return direction


def adam_mini(blocks, b1=0.8, b2=0.95, eps=1e-3):
    """Adam with one second moment a block: `blocks` numbers the entries of a matrix."""
    m, t = 0.0, 0
    v = np.zeros(blocks.max() + 1)

    def direction(g):
        nonlocal m, t
        t += 1
        m = b1 * m + (1 - b1) * g
        for block in range(v.size):
            v[block] = b2 * v[block] + (1 - b2) * (g[blocks == block] ** 2).mean()
        return m / (1 - b1**t) / (np.sqrt(v[blocks] / (1 - b2**t)) + eps)

    return direction


def eight_bits(block, b1=0.9, b2=0.999, eps=1e-8):
    """Adam whose moments are rounded to their codes after every step."""
    m = v = 0.0
    t = 0

    def direction(g):
        nonlocal m, v, t
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        m, v = dynamic(m, block, signed=True), dynamic(v, block, signed=False)
        return step

    return direction


def galore(w, grads, direction):
    """The weight `(s, k)` after all steps, s the smaller."""
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            p = np.linalg.svd(g)[0][:, :RANK]
            p = p * np.sign(p[np.argmax(np.abs(p), axis=0), np.arange(RANK)])
        w = (w - RATE * SCALE * p @ direction(p.T @ g)) * (1 - RATE * DECAY)
    return w


def run(tx, weight, grads):
    params = {"query": {"kernel": jnp.asarray(weight, jnp.float32)}}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        grad = {"query": {"kernel": jnp.asarray(grad, jnp.float32)}}
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["query"]["kernel"])


def problem(shape):
    generator = np.random.default_rng(0)
    return generator.normal(size=shape), generator.normal(size=(STEPS, *shape))


A = lrx.inner
MINI = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
INNERS = {
    "8 bits": (A.stored8(minimum=0, block=4), lambda flipped: eight_bits(4)),
    "adafactor": (A.adafactor(), lambda flipped: adafactor(None, 0.8, 1.0)),
    "adafactor with a moment": (
        A.adafactor(b1=0.9, power=0.5, clip=0.7),
        lambda flipped: adafactor(0.9, 0.5, 0.7),
    ),
    # outputs are columns of R, or where they are shrunk its rows
    "adam_mini": (
        A.adam_mini(**MINI),
        lambda flipped: adam_mini(np.indices((RANK, 10))[0 if flipped else 1]),
    ),
    # two heads of five outputs; where outputs are shrunk they are in no head
    "adam_mini by heads": (
        A.adam_mini(heads=(("query/.*", 2),), **MINI),
        lambda flipped: adam_mini(
            np.indices((RANK, 10))[0] if flipped else np.indices((RANK, 10))[1] // 5
        ),
    ),
}


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_galore_with_another_inner_is_numpys(name, shape):
    inner, reference = INNERS[name]
    weight, grads = problem(shape)
    flipped = shape[0] > shape[1]
    flip = np.transpose if flipped else lambda x: x
    tx = lrx.galore(RATE, rank=RANK, refresh_every=EVERY, weight_decay=DECAY, inner=inner)
    want = galore(flip(weight), [flip(g) for g in grads], reference(flipped))
    got = run(tx, weight, grads)
    np.testing.assert_allclose(got - weight, flip(want) - weight, rtol=1e-3, atol=2e-5)


def test_grouped_queries_have_blocks_of_their_own():
    """4 heads of queries and 2 of keys, of 3 outputs; values have a block an output."""
    views = lrx.Views(rules=((".*", lrx.MatrixView(rows=(0,), cols=(1, 2))),))
    inner = lrx.inner.adam_mini(**MINI)
    tx = lrx.scale_by_projection(lrx.projectors.identity(), inner=inner, views=views)
    heads = {"query": 4, "key": 2, "value": 2}
    generator = np.random.default_rng(1)
    grads = {name: {"kernel": generator.normal(size=(3, 5, n, 3))} for name, n in heads.items()}
    first = jax.tree.map(lambda x: jnp.asarray(x[0], jnp.float32), grads)
    state = tx.init(first)
    for t in range(3):
        own = jax.tree.map(lambda x: jnp.asarray(x[t], jnp.float32), grads)  # noqa: B023
        updates, state = tx.update(own, state, first)
    for name, n in heads.items():
        outputs = np.indices((5, n * 3))[1]
        direction = adam_mini(outputs if name == "value" else outputs // 3)
        for g in grads[name]["kernel"]:
            want = direction(g.reshape(5, n * 3))
        got = np.asarray(updates[name]["kernel"]).reshape(5, n * 3)
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_vectors_and_plain_leaves():
    """Of vectors Adafactor has whole second moments, and Adam-mini Adam's of all plain leaves."""
    generator = np.random.default_rng(2)
    grads = generator.normal(size=(3, 7)).astype(np.float32)
    inner = lrx.inner.adafactor()
    state, v = inner.init({"b": jnp.zeros(7)}), 0.0
    for t, g in enumerate(grads, 1):
        direction, _, state = inner.update({"b": jnp.asarray(g)}, state)
        v = (1 - t**-0.8) * v + t**-0.8 * g.astype(np.float64) ** 2
        u = g / np.sqrt(v)
        want = u / max(1, np.sqrt((u**2).mean()))
        np.testing.assert_allclose(direction["b"], want, rtol=1e-4)
    mini, adam = lrx.inner.adam_mini(), lrx.inner.adam()
    embedding = jnp.asarray(grads)
    own, other = (x.update(embedding, x.init(embedding))[0] for x in (mini, adam))
    np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: A.adafactor(b1=1.0), r"adafactor: b1=1\.0 must be .*None for no moment"),
        (lambda: A.adafactor(power=0), "adafactor: power=0 must be"),
        (lambda: A.adafactor(clip=-1.0), r"adafactor: clip=-1\.0 must be"),
        (lambda: A.adafactor(eps=0.0), r"adafactor: eps=0\.0 must be"),
        (lambda: A.adam_mini(heads=("query", 2)), "adam_mini: heads=.* must be pairs"),
        (lambda: A.adam_mini(b2=2.0), r"b2=2\.0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    tx = lrx.galore(1e-2, rank=2, inner=A.adam_mini(heads=((".*", 3),)))
    with pytest.raises(ValueError, match="heads=3 of 'kernel' must be 0 or divide its 8 outputs"):
        tx.init({"kernel": jnp.ones((4, 8))})
