"""`combine` against PEFT's `add_weighted_adapter`, on a linear layer and an embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
peft = pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx  # noqa: E402

RANK = 3
ALPHAS = {"one": 6.0, "two": 2.0, "three": 3.0}
WEIGHTS = [0.8, -0.5, 1.5]
SHAPES = {"dense": (8, 6), "embed": (9, 5)}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(8, 6, bias=False)
        self.embed = torch.nn.Embedding(9, 5)


@pytest.fixture(scope="module")
def factors():
    random = np.random.default_rng(0)
    return {
        name: {
            at: (random.normal(size=(n, RANK)), random.normal(size=(RANK, m)))
            for at, (n, m) in SHAPES.items()
        }
        for name in ALPHAS
    }


def theirs(factors, method, **options):
    """`{layer: delta (n, m)}` of the combined adapter."""
    config = {
        name: peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["dense", "embed"])
        for name, alpha in ALPHAS.items()
    }
    model = peft.get_peft_model(Model(), config["one"], adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, config[name])
    base = model.base_model.model
    for name, own in factors.items():
        tensors = {
            where: [torch.from_numpy(x.T.astype(np.float32)) for x in pair]
            for where, pair in own.items()
        }
        base.dense.lora_A[name].weight.data, base.dense.lora_B[name].weight.data = tensors["dense"]
        base.embed.lora_embedding_A[name].data, base.embed.lora_embedding_B[name].data = tensors[
            "embed"
        ]
    model.add_weighted_adapter(list(ALPHAS), WEIGHTS, "all", combination_type=method, **options)
    # a linear layer's weight is the transposed kernel, an embedding's is the table itself
    delta = {
        "dense": base.dense.get_delta_weight("all").T,
        "embed": base.embed.get_delta_weight("all"),
    }
    return {where: x.detach().numpy() for where, x in delta.items()}


def ours(factors, method, **options):
    params = {"dense": {"kernel": jnp.zeros((8, 6))}, "embed": {"embedding": jnp.zeros((9, 5))}}
    each = {}
    for name, own in factors.items():
        rules = {"(dense|embed)/.*": lrx.adapters.lora(rank=RANK, alpha=ALPHAS[name])}
        one = lrx.adapt(params, rules, jax.random.key(0))
        sites = {
            path: dict(
                zip(
                    "ab",
                    (jnp.asarray(x, jnp.float32) for x in own[path.split("/")[0]]),
                    strict=True,
                )
            )
            for path in one.layout.by_path
        }
        each[name] = one.replace(train=one.train | {"sites": sites})
    found = lrx.effective(params, lrx.adapters.combine(each, WEIGHTS, method=method, **options))
    return {"dense": found["dense"]["kernel"], "embed": found["embed"]["embedding"]}


CASES = [
    ("cat", {}),
    ("linear", {}),
    ("svd", {}),
    ("svd", {"rank": 2}),
    ("magnitude_prune", {"density": 0.4}),
    ("magnitude_prune_svd", {"density": 0.4, "rank": 4}),
    ("ties", {"density": 0.7}),
    ("ties", {"density": 0.7, "majority_sign": "frequency"}),
    ("ties_svd", {"density": 0.7, "majority_sign": "frequency", "rank": 2}),
    ("dare_linear", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6}),
    ("dare_ties_svd", {"density": 0.6, "majority_sign": "frequency"}),
]


@pytest.mark.parametrize("method, options", CASES, ids=str)
def test_every_method_is_theirs(factors, method, options, monkeypatch):
    # one pattern of dropped entries for both, equal to its transpose
    pattern = lambda rows, cols: (np.arange(rows)[:, None] + np.arange(cols)) % 3 > 0  # noqa: E731
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.asarray(pattern(*shape)))
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: torch.from_numpy(pattern(*p.shape).astype(np.float32))
    )
    names = {"rank": "svd_rank", "majority_sign": "majority_sign_method"}
    want = theirs(
        factors, method, **{names.get(name, name): value for name, value in options.items()}
    )
    got = ours(
        factors, method, **options, **({"key": jax.random.key(0)} if "dare" in method else {})
    )
    for where in SHAPES:
        np.testing.assert_allclose(got[where], want[where], atol=3e-5)
