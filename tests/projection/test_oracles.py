"""Every named method against a short float64 NumPy reference, written from the papers' equations in
(out, in) layout.

Random gradients, several refreshes, tall, wide and square weights; moments are kept, rotated or
reset across refreshes, so that signs, sides, counters and transports all matter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import lowrank_jax as lrx

SHAPES = [(12, 7), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(7, 12), (9, 9)])]
STEPS, LR, DECAY, RANK = 9, 0.02, 0.1, 3


def adam(g, m, v, t, b1=0.9, b2=0.999, eps=1e-8, family="B"):
    """New moments, uncorrected direction and bias-correction scale of Adam at 1-based t."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    correction = np.sqrt(1 - b2**t)
    return (
        m,
        v,
        m / (np.sqrt(v) + eps * (correction if family == "B" else 1)),
        correction / (1 - b1**t),
    )


def signed(u):
    return u * np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])


def left_basis(g, rank):
    return signed(np.linalg.svd(g, full_matrices=False)[0][:, :rank])


def oriented(method):
    """Runs a reference written for 'left' matrices (rows shrunk) on weights of any shape."""

    def run(weight, grads, tie_left=False, **options):
        m, n = weight.shape
        left = m < n or (m == n and tie_left)
        flip = (lambda x: x) if left else (lambda x: x.T)
        return flip(method(flip(weight), [flip(g) for g in grads], **options))

    return run


@oriented
def galore(w, grads, period=4, scale=0.25):
    m = v = np.zeros((RANK, w.shape[1]))
    for t, g in enumerate(grads):
        if t % period == 0:
            p = left_basis(g, RANK)
        m, v, n, c = adam(p.T @ g, m, v, t + 1, eps=1e-6, family="A")
        w = w - LR * scale * c * p @ n
        w = w - LR * DECAY * w
    return w


@oriented
def galore_full(
    w, grads, period=4, scale=0.25, eps=1e-2
):  # a large eps: off-diagonal noise of R must not count
    m = v = np.zeros((RANK, RANK))
    for t, g in enumerate(grads):
        if t % period == 0:
            p = left_basis(g, RANK)
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            q = vt[:RANK].T * (np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])[:RANK])
        m, v, n, c = adam(p.T @ g @ q, m, v, t + 1, eps=eps, family="A")
        w = (w - LR * scale * c * p @ n @ q.T) * (1 - LR * DECAY)
    return w


@oriented
def dct_adamw(w, grads, period=1, kind=3, feedback=False):
    s = w.shape[0]
    m = v = np.zeros((RANK, w.shape[1]))
    e = np.zeros_like(w)
    dct2 = scipy.fft.dct(np.eye(s), type=2, norm="ortho", axis=0)  # rows are the DCT-II vectors
    q = dct2 if kind == 3 else dct2.T
    old = None
    for t, g in enumerate(grads):
        w = (1 - LR * DECAY) * w
        k = g + e
        if t == 0 or (t + 1) % period == 0:
            new = np.sort(np.argsort(-np.abs(q.T @ k).sum(1))[:RANK])
            if old is not None:
                moved = [np.where(new[:, None] == old[None], 1.0, 0.0) @ x for x in (m, v)]
                m, v = moved
            old = new
        p = q[:, old]
        low = p.T @ k
        e = k - p @ low if feedback else e
        m, v, n, c = adam(low, m, v, t + 1)
        w = w - LR * c * p @ n
    return w


@oriented
def frugal(w, grads, period=4, rho=0.4, rule=np.sign, s_p=0.8, s_i=0.5):
    r = round(rho * w.shape[0])
    for t, g in enumerate(grads):
        if t % period == 0:
            p, count = left_basis(g, r), 0
            m = v = np.zeros((r, w.shape[1]))
        count += 1
        w = (1 - LR * DECAY) * w
        m, v, n, c = adam(p.T @ g, m, v, count)
        w = w - LR * s_p * c * p @ n - LR * s_p * s_i * rule(g - p @ p.T @ g)
    return w


@oriented
def ldadam(w, grads, b1=0.908, b2=0.99, rho=0.908, feedback=True):
    m = v = np.zeros((RANK, w.shape[1]))
    e = np.zeros_like(w)
    for t, g in enumerate(grads):
        k = g + e
        if t == 0:
            p = left_basis(k, RANK)
            lost = 0
        else:
            b = rho * p @ m / (1 - b1**t) + (1 - rho) * k
            new = np.linalg.qr(b @ b.T @ p)[0]
            c = new.T @ p
            mean = m / (1 - b1**t)
            v = (1 - b2**t) * np.abs(c**2 @ (v / (1 - b2**t) - mean**2) + (c @ mean) ** 2)
            lost = b1 / (1 - b1) * (p @ m - new @ c @ m)
            p, m = new, c @ m
        low = p.T @ k
        e = k - p @ low + lost if feedback else e
        m, v, n, scale = adam(low, m, v, t + 1, b1=b1, b2=b2)
        w = (1 - LR * DECAY) * w - LR * scale * p @ n
    return w


@oriented
def apollo(w, grads, basis=None, axis=0, scale=2.0, limiter=1.01, period=4):
    previous = None
    for t, g in enumerate(grads):
        if basis is not None:
            p = basis
        elif t % period == 0:
            p = left_basis(g, RANK)
        low = p.T @ g
        if t == 0:
            m = v = np.zeros_like(low)
        m, v, n, c = adam(low, m, v, t + 1, eps=1e-6, family="A")
        s = (
            g
            * np.linalg.norm(n, axis=axis)
            / (np.linalg.norm(low, axis=axis) + 1e-8)
            * np.sqrt(scale)
        )
        norm = np.linalg.norm(s)
        if limiter and previous is not None:
            growth = max(norm / (previous + 1e-8), limiter) / limiter
            s, norm = s / growth, norm / growth
        previous = norm
        w = (w - LR * c * s) * (1 - LR * DECAY)
    return w


@oriented
def fira(w, grads, scale=0.25, removed=0.25, limiter=1.01, period=4):
    m = v = np.zeros((RANK, w.shape[1]))
    previous = None
    for t, g in enumerate(grads):
        if t % period == 0:
            p = left_basis(g, RANK)
        low = p.T @ g
        m, v, n, c = adam(low, m, v, t + 1, eps=1e-6, family="A")
        f = np.linalg.norm(n, axis=0) / (np.linalg.norm(low, axis=0) + 1e-8)
        s = (g - removed * p @ low) * f
        norm = np.linalg.norm(s)
        if previous is not None:
            growth = max(norm / (previous + 1e-8), limiter) / limiter
            s, norm = s / growth, norm / growth
        previous = norm
        w = (w - LR * c * (scale * p @ n + s)) * (1 - LR * DECAY)
    return w


@oriented
def online_subspace_descent(w, grads, optimizer="adamw", rate=lambda t: LR, period=10):
    m = v = np.zeros((RANK, w.shape[1]))
    p = left_basis(grads[0], RANK)
    m_p = v_p = np.zeros_like(p)
    for t, g in enumerate(grads):
        low = p.T @ g
        m, v, n, c = adam(low, m, v, t + 1, eps=1e-6, family="A")
        w = (w - rate(t) * 0.25 * c * p @ n) * (1 - rate(t) * DECAY)
        if t == 0:
            continue
        unit = g / np.linalg.norm(g)
        error = p @ p.T @ unit - unit
        gradient = 2 * (error @ (p.T @ unit).T + unit @ (error.T @ p))
        lr = rate(t) / LR / period
        if optimizer == "sgd":
            p = p - lr * gradient
        else:
            m_p, v_p, n, c = adam(gradient, m_p, v_p, t)
            p = p - lr * 0.01 * p - lr * c * n
    return w


def random_basis(s):
    return np.random.default_rng(5).normal(size=(s, RANK)).astype(np.float32)


RATES = {"number": LR, "schedule": optax.warmup_cosine_decay_schedule(0, LR, 3, STEPS)}

CASES = {
    "galore": (lambda s: lrx.galore(LR, rank=RANK, refresh_every=4, weight_decay=DECAY), galore, {}),
    "galore_full": (
        lambda s: lrx.galore(LR, rank=RANK, refresh_every=4, proj_type="full", eps=1e-2, weight_decay=DECAY),
        galore_full,
        {},
    ),
    **{
        f"dct_adamw_{kind}_{period}_{feedback}": (
            lambda s, o=(kind, period, feedback): lrx.dct_adamw(
                LR, rank=RANK, kind=o[0], refresh_every=o[1], error_feedback=o[2], weight_decay=DECAY
            ),
            dct_adamw,
            {"kind": kind, "period": period, "feedback": feedback},
        )
        for kind, period, feedback in [(3, 1, False), (2, 3, True), (3, 4, True)]
    },
    "frugal_sign": (
        lambda s: lrx.frugal(
            LR, rank=0.4, refresh_every=4, active_scale=0.8, inactive_scale=0.5, weight_decay=DECAY
        ), frugal, {}
    ),
    "frugal_sgd": (
        lambda s: lrx.frugal(
            LR, rank=0.4, refresh_every=4, rule="sgd", active_scale=0.8, inactive_scale=0.5, weight_decay=DECAY
        ), frugal, {"rule": lambda x: x}
    ),
    "ldadam": (lambda s: lrx.ldadam(LR, rank=RANK, weight_decay=DECAY), ldadam, {"tie_left": True}),
    "ldadam_no_feedback": (
        lambda s: lrx.ldadam(LR, rank=RANK, weight_decay=DECAY, error_feedback=False),
        ldadam, {"tie_left": True, "feedback": False},
    ),
    "apollo_channel": (
        lambda s: lrx.apollo(
            LR, projector=lrx.projectors.svd(rank=RANK), scale=2.0, refresh_every=4, weight_decay=DECAY
        ),
        apollo, {},
    ),
    "apollo_tensor": (
        lambda s: lrx.apollo(
            LR, projector=lrx.projectors.given(matrix=random_basis(s)), axis="tensor", scale=2.0, weight_decay=DECAY
        ), apollo, {"axis": None, "basis": random_basis},
    ),
    "apollo_unlimited": (
        lambda s: lrx.apollo(
            LR, projector=lrx.projectors.given(matrix=random_basis(s)), limiter=None, scale=2.0, weight_decay=DECAY
        ), apollo, {"limiter": None, "basis": random_basis},
    ),
    **{
        f"fira_{form}": (
            lambda s, form=form: lrx.fira(LR, rank=RANK, refresh_every=4, form=form, weight_decay=DECAY),
            fira,
            {"removed": removed},
        )
        for form, removed in [("code", 0.25), ("paper", 1.0)]
    },
    **{
        f"online_subspace_descent_{optimizer}_{rate}": (
            lambda s, optimizer=optimizer, rate=rate: lrx.online_subspace_descent(
                RATES[rate], rank=RANK, refresh_every=10, basis_optimizer=optimizer, weight_decay=DECAY,
                peak_rate=LR if rate == "schedule" else None,
            ),
            online_subspace_descent,
            {"optimizer": optimizer} | ({"rate": RATES[rate]} if rate == "schedule" else {}),
        )
        for optimizer, rate in [("adamw", "schedule"), ("adamw", "number"), ("sgd", "schedule")]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_named_methods_match_their_references(name, shape):
    make, reference, options = CASES[name]
    rng = np.random.default_rng(3)
    weight = rng.normal(size=shape)
    # A decaying spectrum keeps singular values apart, so that the SVD basis is defined up to sign.
    spread = np.geomspace(4, 0.3, min(shape))
    grads = []
    for _ in range(STEPS):
        u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        grads.append((u * spread) @ vt)
    options = {
        key: value(min(shape)) if value is random_basis else value for key, value in options.items()
    }
    want = reference(weight, grads, **options)

    tx = make(min(shape))
    params = {"kernel": jnp.asarray(weight.T, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad.T, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    got = np.asarray(params["kernel"]).T
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=2e-5)
