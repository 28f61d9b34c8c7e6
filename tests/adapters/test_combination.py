"""One LoRA out of several, against NumPy as PEFT defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters.combination import METHODS, combine, largest

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

VIEWS = lrx.Views(stacked=("layers/.*",))
PARAMS = {"layers": {"kernel": jnp.zeros((2, 6, 5))}, "out": {"kernel": jnp.zeros((5, 7))}}
PATHS = ("layers/kernel", "out/kernel")
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(seed, params=PARAMS, rules=None, **options):
    rules = lrx.adapters.lora(rank=3, alpha=2.0 + seed) if rules is None else rules
    adaptation = lrx.adapt(params, rules, KEY, views=VIEWS if params is PARAMS else None, **options)
    leaves, treedef = jax.tree.flatten(adaptation.train)
    new = [jnp.asarray(normal(100 * seed + i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return adaptation.replace(train=jax.tree.unflatten(treedef, new))


FLAT = {"out": PARAMS["out"]}
ONE, TWO, THREE = made(1), made(2), made(3)
ALL, WEIGHTS = {"one": ONE, "two": TWO, "three": THREE}, [0.7, -0.4, 1.3]


def numpy_pairs(adaptation, path, layer):
    """`(a, s, b)` of one matrix, float64."""
    arrays = adaptation.frozen["sites"][path] | adaptation.train["sites"][path]
    index = (layer,) if path.startswith("layers") else ()
    return tuple(np.asarray(arrays[name][index], np.float64) for name in ("a", "scale", "b"))


def delta(adaptation, path, layer=0):
    a, s, b = numpy_pairs(adaptation, path, layer)
    return (a * s) @ b


def matrices(path):
    return range(2) if path.startswith("layers") else range(1)


def trim(x, density):
    flat = np.abs(x).reshape(-1)
    mask = np.zeros(flat.shape)
    mask[np.argsort(-flat, kind="stable")[: int(density * flat.size)]] = 1
    return x * mask.reshape(x.shape)


def merged(tensors, weights, method, density, majority_sign):
    """PEFT's function of the same name on one tensor of each task."""
    if method in ("ties", "magnitude_prune"):
        tensors = [trim(x, density) for x in tensors]
    tensors, weights = np.stack(tensors), np.reshape(weights, (-1, 1, 1))
    if method != "ties":
        return (tensors * weights).sum(axis=0)
    votes = tensors.sum(axis=0) if majority_sign == "total" else np.sign(tensors).sum(axis=0)
    agree = np.sign(tensors) == np.where(votes >= 0, 1, -1)
    return (tensors * weights * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def oracle(method, path, layer, density=1.0, majority_sign="total", rank=3, tasks=None):
    pairs = [numpy_pairs(one, path, layer) for one in (tasks or ALL).values()]
    bare = method.removesuffix("_svd")
    if method == "cat":
        return sum(w * (a * s) @ b for w, (a, s, b) in zip(WEIGHTS, pairs, strict=True))
    if method == "svd" or method.endswith("_svd"):
        bare = "linear" if method == "svd" else bare
        dense = merged([(a * s) @ b for a, s, b in pairs], WEIGHTS, bare, density, majority_sign)
        u, s, vt = np.linalg.svd(dense)
        return (u[:, :rank] * s[:rank]) @ vt[:rank]
    strength = [w * s[0] for w, (_, s, _) in zip(WEIGHTS, pairs, strict=True)]
    root = np.sqrt(np.abs(strength))
    a = merged([a for a, _, _ in pairs], np.sign(strength) * root, bare, density, majority_sign)
    b = merged([b for _, _, b in pairs], root, bare, density, majority_sign)
    return a @ b


def flat_oracle(method):
    return oracle(
        method, "out/kernel", 0, tasks={name: made(i + 1, FLAT) for i, name in enumerate(ALL)}
    )


CASES = [
    ("cat", {}),
    ("svd", {}),
    ("svd", {"rank": 2}),
    ("linear", {}),
    ("magnitude_prune", {"density": 0.43}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.6, "majority_sign": "frequency"}),
    ("magnitude_prune_svd", {"density": 0.43, "rank": 2}),
    ("ties_svd", {"density": 0.6, "rank": 4}),
    ("ties_svd", {"density": 1.0, "majority_sign": "frequency"}),
]


@pytest.mark.parametrize("method, options", CASES, ids=str)
def test_methods_are_pefts(method, options):
    found = combine(ALL, WEIGHTS, method=method, **options)
    for path in PATHS:
        for layer in matrices(path):
            np.testing.assert_allclose(
                delta(found, path, layer), oracle(method, path, layer, **options), atol=2e-5
            )
    rank = {"cat": 9, "linear": 3}.get(method, options.get("rank", 3))
    assert found.layout.by_path["out/kernel"][1].rank == rank
    assert found.layout.name == "combined"
    assert all((arrays["scale"] == 1).all() for arrays in found.frozen["sites"].values())


def test_options_change_the_result():
    base = [
        delta(combine(ALL, WEIGHTS, method="ties", **options), "out/kernel")
        for options in (
            {"density": 0.6},
            {"density": 0.5},
            {"density": 0.6, "majority_sign": "frequency"},
        )
    ]
    assert not np.allclose(base[0], base[1], atol=1e-3) and not np.allclose(
        base[0], base[2], atol=1e-3
    )


def test_the_sheet_example_of_ties():
    tasks = [(3.0, -1.0, 0.0, 2.0), (-1.0, -2.0, 1.0, 2.0)]
    params = {"kernel": jnp.zeros((1, 4))}
    each = {}
    for i, task in enumerate(tasks):
        one = lrx.adapt(params, lrx.adapters.lora(rank=1, alpha=1), KEY)
        factors = {"kernel": {"a": jnp.ones((1, 1)), "b": jnp.asarray([task])}}
        each[str(i)] = one.replace(train=one.train | {"sites": factors})
    for method in ("ties", "ties_svd"):
        found = combine(each, [1, 1], method=method, density=1.0)
        np.testing.assert_allclose(delta(found, "kernel"), [[3, -1.5, 1, 2]], atol=1e-5)


def test_what_is_trimmed_and_what_of_equal_entries():
    x = np.array(
        [[[2.0, -2.0, 1.0], [0.0, 2.0, -3.0]], [[0.0, 0.0, 0.0], [5.0, 4.0, 3.0]]], np.float32
    )
    got = largest(jnp.asarray(x), 0.5, np.ones(x.shape, bool))
    np.testing.assert_array_equal(got, [[[2, -2, 0], [0, 0, -3]], [[0, 0, 0], [5, 4, 3]]])
    own = np.broadcast_to(
        np.array([True, True, False]), x.shape
    )  # the third column is padding: half of 4 is kept
    np.testing.assert_array_equal(largest(jnp.asarray(x), 0.5, own)[0], [[2, -2, 0], [0, 0, 0]])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_drops_by_the_key_and_is_plain_at_density_1(method):
    run = functools.partial(
        combine, {name: made(i + 1, FLAT) for i, name in enumerate(ALL)}, WEIGHTS, method=method
    )
    first, again, other = (
        delta(run(density=0.5, key=jax.random.key(seed)), "out/kernel") for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    plain = (
        method.replace("dare_linear_svd", "svd")
        .replace("dare_linear", "linear")
        .replace("dare_ties", "ties")
    )
    assert not np.allclose(first, flat_oracle(plain), atol=1e-3)
    np.testing.assert_allclose(
        delta(run(density=1.0, key=KEY), "out/kernel"), flat_oracle(plain), atol=2e-5
    )


@pytest.mark.slow
def test_dare_keeps_the_mean_and_draws_each_factor_task_and_layer_apart():
    params = {"layers": {"kernel": jnp.zeros((2, 64, 32))}}
    one = lrx.adapt(params, lrx.adapters.lora(rank=32, alpha=32), KEY, views=VIEWS)
    eye = {"a": jnp.ones((2, 64, 32)), "b": jnp.ones((2, 32, 32))}
    one = one.replace(train=one.train | {"sites": {"layers/kernel": eye}})
    found = combine({"one": one}, [1], method="dare_linear", density=0.25, key=KEY).train["sites"][
        "layers/kernel"
    ]
    a, b = np.asarray(found["a"]), np.asarray(found["b"])
    assert set(np.unique(a)) == {0.0, 4.0}
    assert abs(a.mean() - 1) < 0.1 and abs(b.mean() - 1) < 0.15
    assert (a[0] != a[1]).any() and (a[:, :32] != b).any()
    twice = combine({"one": one, "two": one}, [1, 1], method="dare_linear", density=0.25, key=KEY)
    assert 4.0 in np.unique(
        twice.train["sites"]["layers/kernel"]["a"]
    )  # one kept it, the other did not


def test_one_sum_of_two_is_both_attached_and_subtraction_undoes_it():
    x = jnp.asarray(normal(5, 3, 5))
    both = lrx.matmul(x, lrx.attach(PARAMS, {"one": ONE, "two": TWO})["out"]["kernel"])
    found = combine({"one": ONE, "two": TWO}, {"two": 1, "one": 1}, method="cat", name="sum")
    np.testing.assert_allclose(
        lrx.matmul(x, lrx.attach(PARAMS, found)["out"]["kernel"]), both, rtol=1e-5, atol=1e-5
    )
    assert found.layout.name == "sum"
    back = combine({"sum": found, "two": TWO}, [1, -1], method="svd", rank=3)
    np.testing.assert_allclose(delta(back, "out/kernel"), delta(ONE, "out/kernel"), atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_task_of_weight_1_is_itself(method):
    options = {"density": 1.0} if method not in ("cat", "svd", "linear") else {}
    options |= {"key": KEY} if "dare" in method else {}
    one = made(1, FLAT)
    found = combine({"one": one}, [1.0], method=method, **options)
    np.testing.assert_allclose(delta(found, "out/kernel"), delta(one, "out/kernel"), atol=2e-5)


def test_energy_chooses_ranks_matrix_by_matrix():
    one = lrx.adapt(
        {"layers": PARAMS["layers"]}, lrx.adapters.lora(rank=3, alpha=3), KEY, views=VIEWS
    )
    left, right = (np.stack([np.linalg.qr(normal(i, n, 3))[0] for i in range(2)]) for n in (6, 5))
    s = np.array([[4.0, 2.0, 0.1], [1.0, 0.01, 0.01]])
    factors = {
        side: jnp.asarray(x, jnp.float32)
        for side, x in (("a", left * s[:, None]), ("b", np.swapaxes(right, 1, 2)))
    }
    one = one.replace(train=one.train | {"sites": {"layers/kernel": factors}})
    for method, extra in (("svd", {}), ("ties_svd", {"density": 1.0})):
        found = combine({"one": one}, [1.0], method=method, energy=0.99, **extra)
        assert dict(found.matrices)["layers/kernel"].ranks == (2, 1)
        assert found.trained == 3 * 11
        np.testing.assert_array_equal(
            found.frozen["sites"]["layers/kernel"]["scale"], [[1, 1], [1, 0]]
        )
        cut = combine({"one": one}, [1.0], method=method, energy=0.99, rank=1, **extra)
        assert dict(cut.matrices)["layers/kernel"].ranks == (1, 1)


@pytest.mark.slow
def test_ranks_padded_in_a_stack_count_as_what_they_are():
    options = {"rules": lrx.adapters.lora(rank=3, alpha=3), "ranks": {"layers/kernel": (1, 3)}}
    one, two = made(1, **options), made(2, **options)
    sites = one.train["sites"]
    poison = (
        sites["layers/kernel"]["a"].at[0, :, 1:].set(100.0)
    )  # beyond the rank of the first layer
    sites = sites | {"layers/kernel": sites["layers/kernel"] | {"a": poison}}
    one = one.replace(train=one.train | {"sites": sites})
    first = [
        {
            side: np.asarray(each.train["sites"]["layers/kernel"][side][0], np.float64)
            for side in "ab"
        }
        for each in (one, two)
    ]
    a, b, strength = (
        [x["a"][:, :1] for x in first],
        [x["b"][:1] for x in first],
        np.array([3.0, 1.5]),
    )
    for method, density in (
        ("cat", None),
        ("linear", None),
        ("ties", 0.5),
        ("magnitude_prune_svd", 0.5),
    ):
        extra = {} if density is None else {"density": density}
        found = combine({"one": one, "two": two}, [1, 0.5], method=method, **extra)
        if method in ("linear", "ties"):
            want = np.matmul(
                *(merged(side, np.sqrt(strength), method, density, "total") for side in (a, b))
            )
        elif method == "cat":
            want = sum(w * x @ y for w, x, y in zip(strength, a, b, strict=True))
        else:
            want = merged(
                [3 * x @ y for x, y in zip(a, b, strict=True)],
                [1, 0.5],
                "magnitude_prune",
                density,
                "total",
            )
            u, s, vt = np.linalg.svd(want)
            want = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(delta(found, "layers/kernel", 0), want, atol=1e-4)
        if method != "magnitude_prune_svd":
            assert dict(found.matrices)["layers/kernel"].ranks[0] == (2 if method == "cat" else 1)


def test_a_leaf_that_one_alone_adapts_takes_that_one_and_whole_leaves_go_along():
    params = {"out": {"kernel": jnp.zeros((5, 7))}, "head": {"kernel": jnp.ones((2, 2))}}
    lora = lrx.adapters.lora(rank=2)
    one = made(1, params, {"out/kernel": lora}, trainable="head/.*")
    two = made(2, params | {"more": {"kernel": jnp.zeros((3, 3))}}, {"more/kernel": lora})
    found = combine({"one": one, "two": two}, [2, 3])
    np.testing.assert_allclose(delta(found, "out/kernel"), 2 * delta(one, "out/kernel"), rtol=1e-5)
    np.testing.assert_allclose(
        delta(found, "more/kernel"), 3 * delta(two, "more/kernel"), rtol=1e-5
    )
    assert found.layout.trainable == ("head/kernel",) and found.train["trainable"] is not None
    np.testing.assert_array_equal(
        found.train["trainable"]["head/kernel"], one.train["trainable"]["head/kernel"]
    )
    with pytest.raises(
        ValueError, match=r"leaves \['head/kernel'\] are trained in full by two adaptations"
    ):
        combine({"one": one, "two": one}, [1, 1])


def test_families_with_factors_and_offsets_combine():
    params = {"kernel": jnp.asarray(normal(1, 8, 6))}
    each = {
        "uni": made(1, params, lrx.adapters.uni_lora(rank=2, size=8)),
        "pissa": made(2, params, lrx.adapters.lora(rank=2, init="pissa")),
    }
    found = combine(each, [1, 2], method="cat")
    kernels = {
        name: np.asarray(lrx.effective(params, one)["kernel"] - params["kernel"])
        for name, one in each.items()
    }
    np.testing.assert_allclose(
        delta(found, "kernel"), kernels["uni"] + 2 * kernels["pissa"], atol=1e-4
    )
    assert found.layout.by_path["kernel"][1].rank == 6


def test_errors_name_what_is_wrong():
    both = {"one": ONE, "two": TWO}
    cases = [
        ({"method": "mean"}, "method='mean' must be one of"),
        ({"method": "linear", "rank": 2}, r"method='linear' does not use \['rank'\]"),
        ({"method": "cat", "energy": 0.9, "density": 0.5}, r"does not use \['energy', 'density'\]"),
        ({"method": "svd", "majority_sign": "frequency"}, r"does not use \['majority_sign'\]"),
        ({"method": "ties", "density": 0.5, "key": KEY}, r"does not use \['key'\]"),
        ({"method": "ties"}, r"density=None must lie in \(0, 1\]"),
        ({"method": "ties", "density": 1.5}, r"density=1.5 must lie in \(0, 1\]"),
        ({"method": "dare_linear", "density": 0.5}, "drops entries at random: pass key="),
        (
            {"method": "ties", "density": 0.5, "majority_sign": "sum"},
            "majority_sign='sum' must be 'total' or",
        ),
        ({"method": "svd", "rank": 0}, "rank=0 must be a positive integer"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            combine(both, [1, 1], **options)
    with pytest.raises(
        ValueError, match=r"weights: given for \['one'\], the adaptations are \['one', 'two'\]"
    ):
        combine(both, {"one": 1})
    with pytest.raises(ValueError, match="weights: 1 for the 2 adaptations"):
        combine(both, [1])
    with pytest.raises(ValueError, match="there is no adaptation"):
        combine({}, [])
    other = made(1, rules=lrx.adapters.lora(rank=2))
    with pytest.raises(
        ValueError, match=r"at 'layers/kernel' the ranks are \{'one': \[3\], 'two': \[2\]\}"
    ):
        combine({"one": ONE, "two": other}, [1, 1], method="linear")
    with pytest.raises(ValueError, match="'oft': Oft at 'out/kernel' has no factors"):
        combine({"oft": made(1, rules={"out/kernel": lrx.adapters.oft(block=5)})}, [1])
    flat = made(1, {"layers": {"kernel": jnp.zeros((6, 5))}})
    with pytest.raises(ValueError, match=r"'layers/kernel': 'one' sees \(2, 6, 5\)"):
        combine({"one": ONE, "two": flat}, [1, 1])
