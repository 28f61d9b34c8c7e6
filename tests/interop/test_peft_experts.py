"""Experts that torch holds in one parameter: PEFT's `target_parameters`, against einsums by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.interop import peft, safetensors

EXPERTS, D, F, RANK = 3, 6, 4, 2
PREFIX = "base_model.model.mlp.experts."
GENERATOR = np.random.default_rng(0)
PARAMS = {
    "experts": {
        "up": jnp.asarray(GENERATOR.normal(size=(EXPERTS, D, 2 * F)), jnp.float32),
        "down": jnp.asarray(GENERATOR.normal(size=(EXPERTS, F, D)), jnp.float32),
    },
    "router": {"kernel": jnp.ones((D, EXPERTS))},
}
TORCH = {"up": "gate_up_proj", "down": "down_proj"}
VIEWS = lrx.Views(
    rules={f"experts/{n}": lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,)) for n in TORCH}
)


def named(path, index, torch=TORCH):
    module, _, leaf = path.rpartition("/")
    if module == "experts":
        return f"mlp.experts.{torch[leaf]}[{index}]"
    return "mlp.router.weight"


def load(folder, names=named, **options):
    return peft.load(folder, PARAMS, names, views=VIEWS, head=None, **options)


def save(folder, adaptation, names=named, **options):
    return peft.save(folder, adaptation, PARAMS, names, views=VIEWS, head=None, **options)


def tensors():
    """Of a file for both parameters: gate_up_proj was wrapped first."""
    shapes = {
        "base_layer.lora_A.weight": (EXPERTS * RANK, D),
        "base_layer.lora_B.weight": (2 * F, RANK * EXPERTS),
        "lora_A.weight": (EXPERTS * RANK, F),
        "lora_B.weight": (D, RANK * EXPERTS),
    }
    draw = lambda shape: GENERATOR.normal(size=shape).astype(np.float32)  # noqa: E731
    return {PREFIX + end: draw(shape) for end, shape in shapes.items()}


def written(folder, tensors, **config):
    safetensors.write(folder / "adapter_model.safetensors", tensors)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": []}
    fields |= {"target_parameters": ["experts.gate_up_proj", "down_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def delta(tensors, before, scale):
    """`(E, n, m)`: A's rows lie expert by expert, B's columns rank by rank."""
    a = tensors[f"{PREFIX}{before}lora_A.weight"].astype(np.float64).reshape(EXPERTS, RANK, -1)
    b = tensors[f"{PREFIX}{before}lora_B.weight"].astype(np.float64)
    return scale * np.einsum("ern,mre->enm", a, b.reshape(len(b), RANK, EXPERTS))


def test_a_file_moves_each_expert_as_peft_does(tmp_path):
    given = tensors()
    folder = written(tmp_path, given, alpha_pattern={r".*\.down_proj": 1})
    merged = lrx.merge(PARAMS, load(folder))
    for name, before, scale in (("up", "base_layer.", 6 / RANK), ("down", "", 1 / RANK)):
        got = np.asarray(merged["experts"][name] - PARAMS["experts"][name])
        np.testing.assert_allclose(got, delta(given, before, scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapted", [("up",), ("down",), ("up", "down"), ("up", "router")])
def test_what_is_written_is_read_again(adapted, tmp_path):
    paths = {name: f"experts/{name}" for name in TORCH} | {"router": "router/kernel"}
    rules = {paths[name]: lrx.adapters.lora(rank=RANK) for name in adapted}
    adaptation = lrx.adapt(PARAMS, rules, jax.random.key(0), views=VIEWS)
    moved = adaptation.replace(train=jax.tree.map(lambda x: x + 0.5, adaptation.train))
    file, config = save(tmp_path, moved)
    fields = json.loads(config.read_text())
    assert fields["target_modules"] == (["router"] if "router" in adapted else [])
    assert fields["target_parameters"] == sorted(TORCH[n] for n in adapted if n in TORCH)
    keys = [key for key in safetensors.read(file) if "experts" in key]
    assert len(keys) == 2 * sum(name in TORCH for name in adapted)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).train, moved.train)


def test_one_rank_for_all_matrices_of_a_parameter_and_its_own(tmp_path):
    rules = {
        "experts/up": lrx.adapters.lora(rank=3, alpha=5),
        "experts/down": lrx.adapters.lora(rank=2, alpha=7),
    }
    adaptation = lrx.adapt(PARAMS, rules, jax.random.key(0), views=VIEWS)
    _, config = save(tmp_path, adaptation)
    fields = json.loads(config.read_text())
    assert len(fields["rank_pattern"]) == len(fields["alpha_pattern"]) == 1
    again = load(tmp_path)
    for one in (adaptation, again):
        assert dict(one.matrices)["experts/up"].ranks == (3, 3, 3)
    moved = jax.tree.map(lambda x: x + 0.5, adaptation.train)
    got, want = (lrx.merge(PARAMS, one.replace(train=moved)) for one in (again, adaptation))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_order_of_unknown_parameters_is_asked_for(tmp_path):
    names = lambda path, index: named(path, index, {"up": "first", "down": "second"})  # noqa: E731
    rules = {f"experts/{name}": lrx.adapters.lora(rank=RANK) for name in TORCH}
    adaptation = lrx.adapt(PARAMS, rules, jax.random.key(0), views=VIEWS)
    with pytest.raises(ValueError, match=r"order: \['mlp.experts.first', 'mlp.experts.second'\]"):
        save(tmp_path, adaptation, names)
    order = ["mlp.experts.second", "mlp.experts.first"]
    file, _ = save(tmp_path, adaptation, names, order=order)
    shapes = safetensors.read(file).shapes
    assert shapes[f"{PREFIX}base_layer.lora_A.weight"].shape == (EXPERTS * RANK, F)
    with pytest.raises(ValueError, match="order:"):
        load(tmp_path, names)
    with pytest.raises(ValueError, match=r"down_proj\[0\]|second\[0\].* is \(2, 4\), not \(2, 6\)"):
        load(tmp_path, names, order=order[::-1])
    again = load(tmp_path, names, order=order)
    jax.tree.map(np.testing.assert_array_equal, again.train, adaptation.train)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"target_parameters": ["w1"]}, r"target_parameters=\['w1'\] takes none .*mlp.experts"),
        ({"target_parameters": "down_proj"}, "target_parameters"),
        ({"target_parameters": ["down_proj"]}, "base_layer.lora_A.weight"),  # not expected
        ({"r": 3}, r"down_proj\[0\].lora_A.weight is \(2, 4\), not \(3, 4\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, tensors(), **config))


def test_a_tensor_that_experts_cannot_share_is_refused(tmp_path):
    given = tensors()
    given[f"{PREFIX}lora_A.weight"] = np.ones((EXPERTS * RANK + 1, F), np.float32)
    with pytest.raises(
        ValueError, match=r"is \(7, 4\), which 3 experts of 'mlp.experts.down_proj'"
    ):
        load(written(tmp_path, given))


def test_what_peft_cannot_hold_is_refused(tmp_path):
    dora = lrx.adapt(
        PARAMS, {"experts/up": lrx.adapters.dora(rank=RANK)}, jax.random.key(0), views=VIEWS
    )
    with pytest.raises(ValueError, match="lora_magnitude_vector.* plain LoRA alone"):
        save(tmp_path, dora)
    ranks = {"experts/up": lrx.adapters.lora(rank=RANK)}
    for sizes, message in (
        ((2, 0, 2), r"gate_up_proj\[1\].* have no adapter"),
        ((2, 1, 2), r"have ranks \[2, 1, 2\]"),
    ):
        uneven = lrx.adapt(
            PARAMS, ranks, jax.random.key(0), views=VIEWS, ranks={"experts/up": sizes}
        )
        with pytest.raises(ValueError, match=message):
            save(tmp_path, uneven)
    assert not list(tmp_path.iterdir())
