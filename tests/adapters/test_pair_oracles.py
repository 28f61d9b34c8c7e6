"""Optimizers on pairs against float64 NumPy references, written from the papers' equations in their
(out, in) layout.

There `W = W0 + s B A`, with `A (r, d)` our aᵀ and `B (k, r)` our bᵀ; a gradient `G (k, d)` of W
gives `∇A = s Bᵀ G` and `∇B = s G Aᵀ`. Then the recorded values of the official codes, and one
training comparison.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax.optim import pair_optimizers as O
from tests.laws.methods import eager

K, D, R, S, STEPS = 6, 5, 2, 2.0, 7
DECAY, RATES = 0.1, [0.02 / (1 + t) for t in range(STEPS)]


def schedule(step):
    return 0.02 / (1 + step)


def problem(seed=0):
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=(R, D)),
        generator.normal(size=(K, R)),
        generator.normal(size=(STEPS, K, D)),
    )


def altlora(
    A,
    B,
    grads,
    *,
    delta=0.0,
    b1=0.9,
    b2=None,
    eps=1e-4,
    correct="none",
    stored=True,
    alternate=1,
    after=False,
):
    """Yields (A, B) after each step. `delta` damps `s² BᵀB`, so that `s⁻² (BᵀB + delta / s² I)⁻¹`
    preconditions."""
    first = {"A": np.zeros_like(A), "B": np.zeros_like(B)}
    second = {"A": np.zeros_like(A), "B": np.zeros_like(B)}
    turns, old_A, old_B = {"A": 0, "B": 0}, A, B

    def moved(name, W, g, carried, eta):
        turns[name] += 1
        t = turns[name]
        m = b1 * carried + (1 - b1) * g
        first[name] = m if stored else b1 * first[name] + (1 - b1) * g
        c, u = 1.0, m
        if b2 is not None:
            second[name] = b2 * second[name] + (1 - b2) * g * g
            u = m / (np.sqrt(second[name]) + eps)
            c = np.sqrt(1 - b2**t) if correct == "both" else 1.0
        c = c if correct == "none" else c / (1 - b1**t)
        return (W - eta * c * u) * (1 - eta * DECAY) if after else W - eta * (c * u + DECAY * W)

    for t, G in enumerate(grads):
        dA, dB, eta = S * B.T @ G, S * G @ A.T, RATES[t]
        now = "AB" if alternate is None else "AB"[(t // alternate) % 2]
        if "A" in now:
            P = np.linalg.inv(B.T @ B + delta / S**2 * np.eye(R))
            A, old_B = moved("A", A, P @ dA / S**2, P @ B.T @ old_B @ first["A"], eta), B
        if "B" in now:
            P = np.linalg.inv(A @ A.T + delta / S**2 * np.eye(R))
            B, old_A = moved("B", B, dB @ P / S**2, first["B"] @ old_A @ A.T @ P, eta), A
        yield A, B


def adam_step(W, g, m, v, t, eta, eps, corrected, after):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    c = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) if corrected else 1.0
    if after:
        return (W - eta * c * m / (np.sqrt(v) + eps)) * (1 - eta * DECAY), m, v
    root = np.sqrt(1 - 0.999**t)  # the torch convention: eps beside the corrected root
    return (1 - eta * DECAY) * W - eta * c * m / (np.sqrt(v) + eps * root), m, v


def scaled_adamw(A, B, grads, *, delta=1e-6, sequential=False, corrected=True):
    mA = vA = np.zeros_like(A)
    mB = vB = np.zeros_like(B)
    for t, G in enumerate(grads):
        dA, dB, old = S * B.T @ G, S * G @ A.T, A
        g = np.linalg.inv(B.T @ B + delta * np.eye(R)) @ dA
        A, mA, vA = adam_step(A, g, mA, vA, t + 1, RATES[t], 1e-6, corrected, after=True)
        old = A if sequential else old
        g = dB @ np.linalg.inv(old @ old.T + delta * np.eye(R))
        B, mB, vB = adam_step(B, g, mB, vB, t + 1, RATES[t], 1e-6, corrected, after=True)
        yield A, B


def lora_plus(A, B, grads, *, ratio=16.0):
    mA = vA = np.zeros_like(A)
    mB = vB = np.zeros_like(B)
    for t, G in enumerate(grads):
        dA, dB = S * B.T @ G, S * G @ A.T
        A, mA, vA = adam_step(A, dA, mA, vA, t + 1, RATES[t], 1e-8, True, after=False)
        B, mB, vB = adam_step(B, dB, mB, vB, t + 1, ratio * RATES[t], 1e-8, True, after=False)
        yield A, B


alt = functools.partial(O.altlora, schedule, scale=S, weight_decay=DECAY)
plus = functools.partial(O.altlora_plus, schedule, scale=S, weight_decay=DECAY)
scaled = functools.partial(O.scaled_adamw, schedule, weight_decay=DECAY)
ADAM2 = {"b2": 0.999}
ROWS = {
    "altlora": (altlora, {}, lambda: alt(damping=0.0)),
    "altlora two turns": (altlora, {"alternate": 2, "delta": 0.3}, lambda: alt(alternate=2, damping=0.3)),
    "altlora official": (
        altlora, {"alternate": None, "correct": "first", "after": True, "b1": 0.8, "delta": 0.3},
        lambda: alt(alternate=None, bias_correction="first", decay="after", b1=0.8, damping=0.3),
    ),
    "altlora_plus": (altlora, ADAM2 | {"correct": "both", "delta": 1e-5}, lambda: plus()),
    "altlora_plus uncorrected": (
        altlora, {"b2": 0.99, "eps": 1e-2, "delta": 0.3},
        lambda: plus(b2=0.99, eps=1e-2, damping=0.3, bias_correction="none"),
    ),
    "altlora_plus official": (
        altlora, ADAM2 | {"alternate": None, "correct": "first", "after": True, "stored": False, "delta": 1e-3},
        lambda: plus(alternate=None, bias_correction="first", decay="after", transport="step", damping=1e-3),
    ),
    "scaled_adamw": (scaled_adamw, {}, lambda: scaled()),
    "scaled_adamw official": (
        scaled_adamw, {"sequential": True, "corrected": False, "delta": 0.3},
        lambda: scaled(order="sequential", bias_correction=False, damping=0.3),
    ),
    "lora_plus": (lora_plus, {}, lambda: O.lora_plus(schedule, weight_decay=DECAY)),
    "lora_plus of 4": (
        lora_plus, {"ratio": 4.0}, lambda: O.lora_plus(schedule, ratio=4.0, weight_decay=DECAY)
    ),
}  # fmt: skip


def jax_step(tx):
    """A step on `{"a", "b"}` with the gradients that a kernel gradient of `s a b` gives."""

    def step(params, state, gradient, scale=S):
        grads = {"a": scale * gradient @ params["b"].T, "b": scale * params["a"].T @ gradient}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return functools.partial(eager, step)


def as_params(A, B):
    return {"a": jnp.asarray(A.T, jnp.float32), "b": jnp.asarray(B.T, jnp.float32)}


@pytest.mark.parametrize("name", ROWS)
def test_reference(name):
    reference, options, build = ROWS[name]
    A, B, grads = problem()
    tx = build()
    params = as_params(A, B)
    step, state = jax_step(tx), tx.init(params)
    for G, (want_A, want_B) in zip(grads, reference(A, B, grads, **options), strict=True):
        params, state = step(params, state, jnp.asarray(G.T, jnp.float32))
        np.testing.assert_allclose(params["a"].T, want_A, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(params["b"].T, want_B, rtol=2e-4, atol=2e-5)


def test_rows_differ():
    """Every row's options matter: no two rows of one reference end in the same place."""
    A, B, grads = problem()
    ends = [
        np.concatenate([x.ravel() for x in list(reference(A, B, grads, **options))[-1]])
        for reference, options, _ in ROWS.values()
    ]
    for i, end in enumerate(ends):
        assert all(np.max(np.abs(end - other)) > 1e-3 for other in ends[:i]), list(ROWS)[i]


def official(row, defaults):
    """The optimizer of a recorded row, whose configuration is in the official codes' words."""
    c = row["configuration"]
    common = {"b1": defaults["b1"], "b2": defaults["b2"], "weight_decay": defaults["weight_decay"]}
    rate = defaults["learning_rate"]
    if row["method"] == "lora_plus":
        return O.lora_plus(rate, ratio=c["ratio"], eps=c["eps"], **common)
    if row["method"] == "scaled_adamw":
        return O.scaled_adamw(
            rate,
            damping=c["reg"],
            eps=c["eps"],
            bias_correction=c["correct_bias"],
            order="sequential",
            **common,
        )
    common |= {"scale": 1.0, "damping": c["reg"], "alternate": c["alternate"], "decay": "after"}
    common["bias_correction"] = "first" if c["correct_bias"] else "none"
    if row["method"] == "altlora":
        del common["b2"]
        return O.altlora(rate, **common)
    return O.altlora_plus(rate, eps=c["eps"], transport="step", **common)


def test_golden_traces(golden):
    """The official codes' factors after five steps; s is in the gradients alone, which those codes
    do not know."""
    recorded, rows = golden("pair_traces"), []
    i, j = np.arange(6)[:, None], np.arange(6)[None]
    weight = 0.5 * np.sin(1 + 0.7 * i + 0.3 * j**2)
    A, B = weight[:2, :4].astype(np.float32), weight[:6, :2].astype(np.float32)
    i, j = i, j[:, :4]
    for row in recorded["rows"]:
        tx = official(row, recorded["defaults"])
        params = as_params(A, B)
        step, state = jax_step(tx), tx.init(params)
        for t in range(recorded["defaults"]["steps"]):
            G = np.sin(0.5 + 1.3 * i * (j + 1) + 0.9 * t) + 0.5 * np.cos(
                0.2 * t * (i + 1) + 1.1 * j
            )
            params, state = step(
                params, state, jnp.asarray(G.T, jnp.float32), recorded["defaults"]["scale"]
            )
        a, b = np.asarray(params["a"]).T, np.asarray(params["b"]).T
        got = {
            "norm_A": np.linalg.norm(a - A),
            "norm_B": np.linalg.norm(b - B),
            "A_0_0": a[0, 0],
            "B_1_0": b[1, 0],
        }
        assert set(got) == set(row["trace"])
        for name, value in row["trace"].items():
            np.testing.assert_allclose(
                got[name], value, rtol=row["tolerance"], err_msg=f"{row['name']} {name}"
            )
        rows.append(row["name"])
    assert len(set(rows)) == len(rows) == 8


def steps_until(tx_of, rates, level, spectrum=(1.0, 0.1, 0.03, 0.01), limit=300):
    """Of the best rate: steps until `|a b - K|²` is `level` of `|K|²`, from an adapter's start;
    `limit` is never."""
    generator = np.random.default_rng(0)
    u, v = (np.linalg.qr(generator.normal(size=(n, 4)))[0] for n in (24, 20))
    target = jnp.asarray(u * np.array(spectrum) @ v.T, jnp.float32)
    bound = 1 / np.sqrt(24)
    start = {
        "a": jnp.asarray(generator.uniform(-bound, bound, size=(24, 4)), jnp.float32),
        "b": jnp.zeros((4, 20)),
    }

    def losses(rate):
        tx = tx_of(rate)

        def body(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(
                lambda p: 0.5 * jnp.sum(jnp.square(p["a"] @ p["b"] - target))
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(body, (start, tx.init(start)), None, length=limit)[1]

    found = np.asarray(jax.jit(jax.vmap(losses))(jnp.asarray(rates))) / (
        0.5 * np.sum(np.square(target))
    )
    return min(int(np.argmax(path < level)) if np.any(path < level) else limit for path in found)


@pytest.mark.slow
def test_preconditioning_pays_where_the_factors_are_ill_conditioned():
    """Singular values from 1 to .01: gradient descent and AdamW crawl along the small ones, the
    others do not.

    Each at the best of its learning rates, from b = 0. Scaled gradient descent's rate does not know
    the condition number, and AltLoRA's is that of descent on the kernel, where this loss has
    condition number one.
    """
    adam_rates, descent_rates, level = (
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        (0.03, 0.1, 0.3, 0.6, 1.0),
        1e-6,
    )
    adamw = functools.partial(optax.adamw, weight_decay=0.0)
    assert steps_until(adamw, adam_rates, level, spectrum=(1.0, 1.0, 1.0, 1.0)) < 200
    assert steps_until(adamw, adam_rates, level) == 300
    assert steps_until(optax.sgd, descent_rates, level) == 300
    assert steps_until(O.scaled_adamw, adam_rates, level) < 200
    assert steps_until(functools.partial(O.altlora, scale=1.0), descent_rates, level) < 200
    assert (
        steps_until(
            lambda rate: optax.chain(O.precondition_pairs(), optax.sgd(rate)), descent_rates, level
        )
        < 200
    )
