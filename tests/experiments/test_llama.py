"""The LLaMA model against a NumPy transcription of its formulas, and its laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import llama
from experiments.models.llama import (
    PROJECTIONS,
    Llama,
    LlamaConfig,
    loss_and_metrics,
    parameter_count,
    preset,
    token_losses,
)
from experiments.models.sampling import sample

TINY = LlamaConfig(
    vocabulary_size=19,
    width=16,
    hidden=24,
    heads=4,
    kv_heads=2,
    layers=2,
    sequence_length=12,
    rope_theta=100.0,
)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7)).astype(np.int32)


def init(config, seed=0):
    """Random leaves of the model's shapes, norm scales around one; without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(0, 0.3, leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


def shapes_of(config):
    return jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS[:, :1])["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens=TOKENS):
    return Llama(config).apply({"params": params}, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def gradient_of(config, params):
    def loss(params):
        return loss_and_metrics(logits_of(config, params), TOKENS, jnp.ones(TOKENS.shape))[0]

    return jax.grad(loss)(params)


def layer_of(stack, i):
    return jax.tree.map(lambda x: x[i], stack)


def unstack(params, layers):
    rest = {k: v for k, v in params.items() if k != "layers"}
    return rest | {f"layer_{i}": layer_of(params["layers"], i) for i in range(layers)}


def numpy_frequencies(K, theta, scaling):
    """By wavelengths, in float64; a pair keeps its frequency, or is slowed down wholly or in
    part."""
    kind, factor, *rest = scaling or ("linear", 1.0)
    slowed = []
    for i in range(K // 2):
        f = theta ** (-2 * i / K)
        if kind == "linear":
            slowed.append(f / factor)
            continue
        low, high, length = rest
        wavelength = 2 * np.pi / f
        if wavelength < length / high:
            slowed.append(f)
        elif wavelength > length / low:
            slowed.append(f / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            slowed.append((1 - smooth) * f / factor + smooth * f)
    return np.array(slowed)


def numpy_llama(params, tokens, config):
    """One sequence, one head, one position at a time, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    K, group = config.head_dim or config.width // config.heads, config.heads // config.kv_heads
    frequencies = numpy_frequencies(K, config.rope_theta, config.rope_scaling)

    def affine(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale

    def rotate(vector, position):  # as complex numbers, half-split
        turned = (vector[: K // 2] + 1j * vector[K // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag])

    def attention(x, p):
        out = np.zeros((len(x), config.heads * K))
        for head in range(config.heads):
            own, shared = (
                slice(head * K, (head + 1) * K),
                slice(head // group * K, (head // group + 1) * K),
            )
            q = [rotate(v, s) for s, v in enumerate(affine(x, p["q_proj"])[:, own])]
            k = [rotate(v, s) for s, v in enumerate(affine(x, p["k_proj"])[:, shared])]
            v = affine(x, p["v_proj"])[:, shared]
            for s in range(len(x)):
                scores = np.array([q[s] @ k[t] / np.sqrt(K) for t in range(s + 1)])
                weights = np.exp(scores - scores.max())
                out[s, own] = weights / weights.sum() @ v[: s + 1]
        return affine(out, p["o_proj"])

    def logits(sequence):
        x = params["embed"]["embedding"][sequence]
        for i in range(config.layers):
            p = layer_of(params["layers"], i)
            x = x + attention(norm(x, p["attention_norm"]["scale"]), p["attention"])
            h = norm(x, p["mlp_norm"]["scale"])
            gate, up = affine(h, p["mlp"]["gate_proj"]), affine(h, p["mlp"]["up_proj"])
            x = x + affine(gate / (1 + np.exp(-gate)) * up, p["mlp"]["down_proj"])
        head = params["embed"]["embedding"].T if config.tied_head else params["lm_head"]["kernel"]
        return norm(x, params["norm"]["scale"]) @ head

    return np.stack([logits(sequence) for sequence in tokens])


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60M", 58.07), ("130M", 134.11), ("350M", 367.97), ("1B", 1339.08), ("7B", 6738.42)],
)
def test_published_parameter_counts(name, millions):
    shapes = shapes_of(preset(name))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert round(count / 1e6, 2) == millions
    assert parameter_count(preset(name)) == count


@pytest.mark.parametrize(
    "overrides", [{}, {"tied_head": True, "kv_heads": 1}, {"head_dim": 40, "biases": PROJECTIONS}]
)
@pytest.mark.parametrize("name", ["nano", "35M"])
def test_parameter_count_is_the_tree(name, overrides):
    config = preset(name, **overrides)
    shapes = shapes_of(config)
    assert parameter_count(config) == sum(x.size for x in jax.tree.leaves(shapes))


def test_parameter_paths():
    params = init(TINY)
    paths = {
        "/".join(k.key for k in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert paths == {
        "embed/embedding": (19, 16),
        "layers/attention/q_proj/kernel": (2, 16, 16),
        "layers/attention/k_proj/kernel": (2, 16, 8),
        "layers/attention/v_proj/kernel": (2, 16, 8),
        "layers/attention/o_proj/kernel": (2, 16, 16),
        "layers/attention_norm/scale": (2, 16),
        "layers/mlp/gate_proj/kernel": (2, 16, 24),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
        "layers/mlp_norm/scale": (2, 16),
        "norm/scale": (16,),
        "lm_head/kernel": (16, 19),
    }


def test_initial_scale_and_distinct_layers():
    params = jax.jit(Llama(preset("nano", layers=2)).init)(jax.random.key(0), TOKENS)["params"]
    for leaf in (
        params["layers"]["mlp"]["up_proj"]["kernel"],
        params["embed"]["embedding"],
        params["lm_head"]["kernel"],
    ):
        assert abs(float(jnp.std(leaf)) - 0.02) < 5e-4
    first, second = params["layers"]["attention"]["q_proj"]["kernel"]
    assert not np.allclose(first, second)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tied_head": True, "rope_scaling": ("linear", 3.0), "biases": ("q_proj", "down_proj")},
        {"head_dim": 6, "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 40), "biases": PROJECTIONS},
    ],
    ids=["plain", "tied, linear, two biases", "head size, llama3, all biases"],
)
def test_logits_equal_the_numpy_model(overrides):
    config = dataclasses.replace(TINY, **overrides)
    params = init(config)
    assert ("lm_head" in params) != config.tied_head
    biased = {
        path[-2].key
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "bias"
    }
    assert biased == set(config.biases or ())
    np.testing.assert_allclose(
        logits_of(config, params), numpy_llama(params, TOKENS, config), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scaling", [None, ("linear", 4.0), ("llama3", 8.0, 1.0, 4.0, 8192)])
def test_rope_frequencies(scaling):
    plain, stretched = numpy_frequencies(128, 5e5, None), numpy_frequencies(128, 5e5, scaling)
    np.testing.assert_allclose(llama.rope_frequencies(128, 5e5, scaling), stretched, rtol=3e-6)
    if scaling and scaling[0] == "llama3":  # all three regimes occur
        ratio = stretched / plain
        assert (
            ratio[0] == 1 and ratio[-1] == 1 / 8 and np.sum((ratio < 0.999) & (ratio > 0.126)) > 5
        )


def test_causality():
    params, changed = init(TINY), TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 19
    before, after = logits_of(TINY, params), logits_of(TINY, params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=(0, 2)).min() > 1e-3


def test_scan_equals_loop():
    params = init(TINY)
    unscanned = dataclasses.replace(TINY, scan=False)
    restacked = unstack(params, 2)
    assert jax.tree.map(jnp.shape, restacked) == jax.tree.map(
        lambda x: x.shape, shapes_of(unscanned)
    )
    np.testing.assert_allclose(
        logits_of(TINY, params), logits_of(unscanned, restacked), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("remat", "scan"), [(True, True), ("dots_with_no_batch_dims_saveable", False)]
)
def test_remat_changes_memory_but_not_gradients(remat, scan):
    plain = dataclasses.replace(TINY, scan=scan, layers=1)
    config, params = dataclasses.replace(plain, remat=remat), init(plain)
    for a, b in zip(
        jax.tree.leaves(gradient_of(plain, params)),
        jax.tree.leaves(gradient_of(config, params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # products fold their rows again in either case; what is made twice here is the softmax
    kept, again = (
        str(jax.make_jaxpr(gradient_of, static_argnums=0)(own, params)) for own in (plain, config)
    )
    assert again.count(" exp ") > kept.count(" exp ")


def test_bfloat16_is_close_and_logits_are_float32():
    params = init(TINY)
    full, half = (
        logits_of(TINY, params),
        logits_of(dataclasses.replace(TINY, dtype="bfloat16"), params),
    )
    assert half.dtype == jnp.float32
    error = np.linalg.norm(full - half) / np.linalg.norm(full)
    assert 1e-4 < error < 3e-2  # not exact, or the products were not bfloat16
    stored = shapes_of(dataclasses.replace(TINY, param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("head_dim", [None, 32])
def test_flops_per_token_counts_matrix_products(head_dim):
    """XLA counts two operations per multiply-add; elementwise work makes its count a little larger
    than ours."""
    config = dataclasses.replace(
        TINY,
        width=64,
        hidden=128,
        vocabulary_size=256,
        sequence_length=32,
        scan=False,
        head_dim=head_dim,
    )
    tokens = np.zeros((2, 32), np.int32)
    cost = logits_of.lower(config, shapes_of(config), tokens).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    ours = llama.flops_per_token(config) / 3 * tokens.size
    assert 1.0 <= cost["flops"] / ours < 1.2


def test_losses():
    rng = np.random.default_rng(1)
    logits, targets, weights = (
        rng.normal(size=(2, 3, 5)) * 4,
        rng.integers(0, 5, (2, 3)),
        np.array([[1, 0, 1], [1, 1, 0.0]]),
    )
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(2)[:, None], np.arange(3), targets])
    np.testing.assert_allclose(
        token_losses(jnp.asarray(logits, jnp.float32), targets), expected, rtol=1e-5
    )
    loss, parts = loss_and_metrics(jnp.asarray(logits, jnp.float32), targets, jnp.asarray(weights))
    np.testing.assert_allclose(loss, (expected * weights).sum() / 4, rtol=1e-5)
    np.testing.assert_allclose(parts["loss_sum"], (expected * weights).sum(), rtol=1e-5)
    assert parts["weight_sum"] == 4
    assert (
        loss_and_metrics(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)))[0]
        == 0
    )


def test_sampling_follows_the_argmax_beyond_the_window():
    config = dataclasses.replace(TINY, sequence_length=6)
    params, prompt = init(config), jnp.asarray(TOKENS[:, :3])
    out = sample(Llama(config), params, prompt, 6, jax.random.key(0), temperature=0)
    tokens = np.asarray(prompt)
    for _ in range(6):
        token = np.argmax(numpy_llama(params, tokens[:, -6:], config)[:, -1], -1)
        tokens = np.concatenate([tokens, token[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(out, tokens[:, 3:])


def test_sampling_is_seeded_and_random():
    params, prompt = init(TINY), jnp.asarray(TOKENS[:1, :3])

    def draw(seed):
        return np.asarray(
            sample(Llama(TINY), params, prompt, 9, jax.random.key(seed), temperature=2.0)
        )

    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(Llama(TINY), params, prompt, 1, jax.random.key(0), temperature=-1)
    with pytest.raises(ValueError, match=r"prompt of 13 tokens.*sequence_length=12"):
        sample(Llama(TINY), params, jnp.zeros((1, 13), jnp.int32), 1, jax.random.key(0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"width": 12}, "width / heads = 3 is odd"),
        ({"layers": 0}, "layers=0: give a positive integer"),
        ({"hidden": 2.5}, "hidden=2.5: is of type float; give int"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: give a positive number"),
        ({"dtype": "float16"}, "dtype='float16': .*Choose one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"head_dim": 0}, "head_dim=0: give a positive integer"),
        ({"biases": ("q_proj", "lm_head")}, r"biases=.*choose among q_proj, k_proj"),
        (
            {"rope_scaling": ("yarn", 2.0)},
            r"rope_scaling=\('yarn', 2.0\): give None, \('linear', factor\)",
        ),
        ({"rope_scaling": ("linear",)}, "rope_scaling="),
        ({"rope_scaling": ("linear", 0.0)}, "positive numbers"),
        ({"rope_scaling": ("llama3", 8.0, 4.0, 1.0, 64)}, "low < high"),
        ({"remat": "all"}, "remat='all': choose False, True, or one of nothing_saveable"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **overrides)


def test_other_errors():
    with pytest.raises(ValueError, match="preset='70M': choose one of nano, 9M"):
        preset("70M")
    with pytest.raises(ValueError, match=r"unknown model field 'depth'.*layers"):
        preset("nano", depth=3)
    with pytest.raises(ValueError, match="13 tokens exceed sequence_length=12"):
        logits_of(TINY, init(TINY), np.zeros((1, 13), np.int32))
