"""PEFT folders that are not read, adaptations that are not written, and what the caller has a say
in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.interop import peft
from tests.interop.peft_files import (
    CASES,
    LORA,
    MODULES,
    VIEWS,
    WEIGHTS,
    Q,
    V,
    load,
    modules,
    normal,
    plain_lora,
    tree,
    whole_params,
    write,
)


def refused(expected, config=LORA, tensors=None, form="stacked", **options):
    return expected, config, tensors, form, options


WITHOUT = {
    key: x for key, x in plain_lora().items() if "layers.1.self_attn.v_proj.lora_B" not in key
}
LOADS = {
    "prefix": refused(
        r"lacks 8 tensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight \(near: "
        r"base_model.model.lay",
        tensors={f"base_model.{key}": x for key, x in plain_lora().items()},
    ),
    "missing": refused("lacks 1 tensor: .*layers.1.self_attn.v_proj.lora_B.weight", tensors=WITHOUT),
    "unexpected": refused("1 is not expected: .*rotary", tensors=plain_lora() | {"model.rotary": normal(2)}),
    "shapes": refused(r"lora_A.weight is \(3, 4\), not \(2, 4\); ", tensors=plain_lora(rank=3)),
    "method": refused("peft_type='IA3' is not supported; known are LORA, HIRA", {"peft_type": "IA3"}),
    "fields": refused(
        r"layer_replication=\[\[0, 2\]\]; lora_bias=True; use_new=1\. "
        r"ignore=",
        LORA
        | {"lora_bias": True, "layer_replication": [[0, 2]], "use_new": 1}
        | {"eva_config": {"rho": 1}},
    ),
    "base of corda": refused("init_lora_weights='corda' .*path_initial_model", LORA | {"init_lora_weights": "corda"}),
    "base of random pissa": refused("randomised SVD", LORA | {"init_lora_weights": "pissa_niter_4"}),
    "dora of pissa": refused("use_dora=True .the norm", LORA | {"init_lora_weights": "pissa", "use_dora": True}),
    "no rank": refused("lacks r, lora_alpha", {"peft_type": "LORA"}),
    "no targets": refused("target_modules=None", LORA | {"target_modules": None}),
    "targets": refused(r"takes none of the modules .* \(near: q_proj\)", LORA | {"target_modules": ["q_prj"]}),
    "bias": refused("bias='vera_only' must be 'none', 'all' or 'lora_only'", LORA | {"bias": "vera_only"}),
    "convolutions of loha": refused("use_effective_conv2d=True", CASES["loha"][0] | {"use_effective_conv2d": True}),
    "old oft": refused("without peft_version of at least 0.18", CASES["oft, neumann"][0] | {"peft_version": "0.17.1"}),
    "terms": refused("num_cayley_neumann_terms=6", CASES["oft, neumann"][0] | {"num_cayley_neumann_terms": 6}),
    "constrained oft": refused("block_share=True; coft=True", CASES["oft"][0] | {"coft": True, "block_share": True}),
    "scales": refused(
        "v_proj.unilora_scales_B is not 1 / sqrt.uses.", CASES["unilora, indices"][0],
        CASES["unilora, indices"][1] | {f"{MODULES[1]}.unilora_scales_B": np.ones((4, 2), np.float32)},
    ),
    "order": refused(r"order: names \['a'\]", *CASES["unilora"][:2], order=["a"]),
    "stack": refused(
        "one size in FOURIERFT; load single layers",
        CASES["fourierft"][0] | {"n_frequency_pattern": {"1.self_attn.q_proj": 6}},
        modules(lambda m, o, i: {"fourierft_spectrum": (6 if m == MODULES[2] else 5,)}),
    ),
    "some layers whole": refused(
        "train in full; load it onto single layers",
        LORA | {"target_modules": ["q_proj"], "modules_to_save": ["1.self_attn.v_proj"]},
        plain_lora([Q.format(0), Q.format(1)]) | {f"{V.format(1)}.weight": normal(4, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADS)
def test_what_is_not_loaded(case, tmp_path):
    expected, config, tensors, form, options = LOADS[case]
    write(tmp_path, config, plain_lora() if tensors is None else tensors)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        load(tmp_path, form, **options)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json does not exist"):
        load(tmp_path, "stacked")
    write(tmp_path, LORA, plain_lora())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="convert adapter_model.bin to it"):
        load(tmp_path, "stacked")
    wrong = {"[]": r"is \[\], where", "{}": "has no 'peft_type'"}
    for text, words in (wrong | {'{"peft_type": "LORA", "r": "8"}': "r is '8', where an"}).items():
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(
            ValueError, match=f"adapter_config.json:? {words}.*save_pretrained wrote"
        ):
            load(tmp_path, "stacked")


def test_what_the_caller_says(tmp_path):
    write(tmp_path, LORA | {"lora_bias": True}, plain_lora())
    assert load(tmp_path, "stacked", ignore=("lora_bias",), name="mine").layout.name == "mine"
    params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}
    own = lambda path, index: "m." + {"a/kernel": "b", "b/kernel": "a"}[path] + ".weight"  # noqa: E731
    tensors = {
        f"m.{m}.{end}": normal(*shape)
        for m in "ab"
        for end, shape in (("hira_A", (2, 4)), ("hira_B", (4, 2)))
    }
    tensors = {key: x for key, x in tensors.items() if key.startswith("m.a")}
    write(tmp_path, {"peft_type": "HIRA", "r": 2, "target_modules": ["a"]}, tensors)
    assert list(peft.load(tmp_path, params, own).layout.by_path) == ["b/kernel"]
    with pytest.raises(ValueError, match="names: 'a/kernel' and 'b/kernel' are both 'w.weight'"):
        peft.load(tmp_path, params, lambda path, index: "w.weight")
    with pytest.raises(ValueError, match="'layers/attention/q_proj/kernel' is a stack"):
        peft.load(tmp_path, tree(WEIGHTS, "stacked"), views=VIEWS)
    theta = {"base_model.unilora_theta_d": normal(4)}
    write(
        tmp_path,
        {"peft_type": "UNILORA", "r": 1, "theta_d_length": 4, "target_modules": ["a", "b"]},
        theta,
    )
    with pytest.raises(ValueError, match="order: indices depend on the order"):
        peft.load(tmp_path, params)
    first, second = (peft.load(tmp_path, params, order=order) for order in (("a", "b"), ("b", "a")))
    np.testing.assert_array_equal(
        first.frozen["sites"]["a/kernel"]["ia"], second.frozen["sites"]["b/kernel"]["ia"]
    )
    assert first.layout.order != second.layout.order
    with pytest.raises(
        ValueError, match="save_indices=False: PEFT would draw other indices for .*'a'"
    ):
        peft.save(tmp_path, first, params, order=("b", "a"), save_indices=False)


def adapted(rules, **options):
    params = whole_params()
    return params, jax.jit(lambda params: lrx.adapt(params, rules, jax.random.key(0), **options))(
        params
    )


UP, DOWN, FEW = "body/up/kernel", "body/down/kernel", lrx.adapters.lora(rank=2)


def other_names(path, index):
    """A norm whose name is the end of another's."""
    names = {DOWN: "xnorm.weight", "body/norm/scale": "norm.weight", "body/norm/bias": "norm.bias"}
    return names.get(path) or peft.linen_name(path)


def moved(adaptation):
    return adaptation.replace(
        frozen=jax.tree.map(lambda x: x[::-1] if x.ndim else x, adaptation.frozen)
    )


def halved(adaptation):
    sites = {
        path: own | {"scale": 0.5 * own["scale"]}
        for path, own in adaptation.frozen["sites"].items()
    }
    return adaptation.replace(frozen=adaptation.frozen | {"sites": sites})


# rules, options of adapt, what becomes of the adaptation, options of save
SAVES = {
    "methods": ("adapters .'hira', 'lora'.; a PEFT file", {UP: FEW, DOWN: lrx.adapters.hira(rank=2)}),
    "dora and lora": ("use_dora: the adapters have .False, True.", {UP: lrx.adapters.dora(rank=2), DOWN: FEW}),
    "dropouts": ("dropout: the adapters have .0.0, 0.1.", {UP: lrx.adapters.lora(rank=2, dropout=0.1), DOWN: FEW}),
    "cayley": ("cayley: the", {UP: lrx.adapters.oft(block=2), DOWN: lrx.adapters.oft(block=2, cayley="neumann")}),
    "blocks": ("block: PEFT has one", {UP: lrx.adapters.oft(block=4), DOWN: lrx.adapters.oft(block=2)}),
    "ranks": ("rank: the adapters have", {UP: lrx.adapters.shira(rank=1), DOWN: lrx.adapters.shira(rank=2)}),
    "bases": ("save_projection=False: PEFT would draw other bases", {UP: lrx.adapters.rand_lora(rank=2)}, {}, moved,
              {"save_projection": False}),
    "alphas": ("alpha: the adapters have", {".*/kernel": lrx.adapters.rand_lora(rank=2)}, {"alphas": {UP: 3.0}}),
    "groups": ("group: .'vera', 'x'. share", {UP: lrx.adapters.vera(rank=2, group="x"),
                                              DOWN: lrx.adapters.vera(rank=2)}),
    "own fields": ("'r'. follow from the adaptation", {UP: FEW}, {}, None, {"r": 3}),
    "options of others": ("'save_indices'. follow", {UP: FEW}, {}, None, {"save_indices": True}),
    "views": ("views: 'body/up/kernel' is", {UP: FEW}, {}, None, {
        "views": lrx.Views(rules=((UP, lrx.MatrixView(rows=(1,), cols=(0,))),))}),
    "biases": ("'body.up.bias'. belong to adapted modules", {UP: lrx.adapters.hira(rank=2)}, {"bias": "adapted"}),
    "kernels": ("would take .'xnorm'. too", {UP: FEW}, {"trainable": "body/norm/.*"}, None, {"names": other_names}),
    "positions": ("positions: PEFT files hold none", {UP: lrx.adapters.fourierft(frequencies=5)}, {}, moved),
    "no weights": ("scale: a UNILORA file holds", {UP: lrx.adapters.uni_lora(rank=2, size=8)}, {}, halved),
    "candidates": ("rows choose among", {UP: FEW}, {}, lambda one: lrx.adapters.candidates({"a": one, "b": one})),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVES)
def test_what_is_not_written(case, tmp_path):
    given = SAVES[case]
    match, rules, options, change, more = (*given, *({}, None, {})[len(given) - 2 :])
    params, adaptation = adapted(rules, **options)
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path, change(adaptation) if change else adaptation, params, **more)


def test_another_tree_is_not_written(tmp_path):
    _, adaptation = adapted({UP: FEW})
    with pytest.raises(ValueError, match="adapted leaf 'body/up/kernel', .4, 6., is missing"):
        peft.save(tmp_path, adaptation, {"head": {"kernel": jnp.ones((4, 3))}})


def test_frequencies_by_name(tmp_path):
    """PEFT matches n_frequency_pattern by other rules than ranks: an end after a dot, or the whole
    name."""
    params, adaptation = adapted(
        {UP: lrx.adapters.fourierft(frequencies=5), DOWN: lrx.adapters.fourierft(frequencies=6)}
    )
    peft.save(tmp_path, adaptation, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["n_frequency"], config["n_frequency_pattern"]) == (6, {"body.up": 5})
    back = peft.load(tmp_path, params)
    assert {path: adapter.frequencies for path, (adapter, _) in back.layout.by_path.items()} == {
        UP: 5,
        DOWN: 6,
    }
