"""PEFT folders without PEFT: what they make of a model, and what is written again. `peft_files`
holds the methods."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.interop import _peft_config, llama, peft, safetensors
from tests.interop.peft_files import (
    CASES,
    FORMS,
    LORA,
    MODULES,
    PREFIX,
    VIEWS,
    WEIGHTS,
    Q,
    V,
    hira,
    load,
    normal,
    of_module,
    plain_lora,
    tree,
    whole_params,
    write,
)

merged = jax.jit(lrx.effective)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_files_make_the_weights_they_stand_for_and_are_written_again(case, form, tmp_path):
    config, tensors, change = CASES[case]
    params = tree(WEIGHTS, form)
    adaptation = load(write(tmp_path, config, tensors), form)
    want = tree({m: change(m, w, of_module(tensors, m)) for m, w in WEIGHTS.items()}, form)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), merged(params, adaptation), want
    )
    options = {"save_indices": False} if case == "unilora" else {}
    files = peft.save(
        tmp_path / "again", adaptation, params, llama.torch_name, views=FORMS[form], **options
    )
    assert [file.name for file in files] == ["adapter_model.safetensors", "adapter_config.json"]
    again, once = (
        safetensors.read(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path)
    )
    assert {k: x.tolist() for k, x in again.items()} == {k: x.tolist() for k, x in once.items()}
    assert again.shapes == once.shapes
    back = load(tmp_path / "again", form)
    jax.tree.map(
        np.testing.assert_array_equal,
        (back.train, back.frozen),
        (adaptation.train, adaptation.frozen),
    )
    assert (back.layout, back.matrices) == (adaptation.layout, adaptation.matrices)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]
    other = {"rank_pattern", "alpha_pattern", "oft_block_size", "peft_version"}
    assert {k: v for k, v in written.items() if k in config and k not in other} == {
        k: v for k, v in config.items() if k not in other
    }


@pytest.mark.parametrize("form", FORMS)
def test_hira_of_several_ranks_is_written_at_the_largest_which_is_what_peft_makes(form, tmp_path):
    config, tensors, change = hira(obeyed=True)
    params, adaptation = tree(WEIGHTS, form), load(write(tmp_path, config, tensors), form)
    ranks = {rank for _, own in adaptation.matrices for rank in own.ranks}
    want = tree({m: change(m, w, of_module(tensors, m)) for m, w in WEIGHTS.items()}, form)
    peft.save(tmp_path / "again", adaptation, params, llama.torch_name, views=FORMS[form])
    written = safetensors.read(tmp_path / "again" / "adapter_model.safetensors")
    assert {key: x.shape for key, x in written.items() if key.endswith("A")} == {
        f"{PREFIX}{m}.hira_A": (3, WEIGHTS[m].shape[1]) for m in MODULES
    }
    entries = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert ranks == {2, 3} and (entries["r"], entries["rank_pattern"]) == (3, {})
    for one in (adaptation, load(tmp_path / "again", form)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5), merged(params, one), want
        )


@pytest.mark.parametrize(
    "targets, layers, pattern, adapted",
    [
        (["q_proj"], [1], None, [Q.format(1)]),
        (
            ["q_proj", V.format(0)],
            [1],
            None,
            [Q.format(1), V.format(0)],
        ),  # a name in full, whatever the layer
        (["q_proj"], 1, "layers", [Q.format(1)]),
        (["q_proj"], [0], ["blocks", "layers"], [Q.format(0)]),
    ],
    ids=str,
)
def test_layers_are_chosen_as_peft_chooses_them(targets, layers, pattern, adapted, tmp_path):
    config = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
    adaptation = load(write(tmp_path, LORA | config, plain_lora(adapted)), "unstacked")
    assert sorted(adaptation.layout.by_path) == sorted(
        f"layer_{m.split('.')[2]}/attention/{m.split('.')[-1]}/kernel" for m in adapted
    )


ROOTS = [(None, False), ("layers", True), (["h", "layers"], True), ("model", False)]


@pytest.mark.parametrize("pattern, adapted", ROOTS)
def test_a_pattern_of_layers_is_found_at_the_root(pattern, adapted):
    config = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": pattern}
    assert _peft_config.is_targeted(config, "layers.1.q", True) is adapted
    assert not _peft_config.is_targeted(config, "layers.0.q", True)


OF_TRAINING = [{"megatron_config": {"x": 4}}, {"module_dropout": 0.1, "runtime_config": {"x": 1}}]


@pytest.mark.parametrize("fields", OF_TRAINING)
def test_what_changes_training_alone_is_passed_over_with_a_warning(fields, tmp_path):
    write(tmp_path, LORA | fields, plain_lora())
    with pytest.warns(
        UserWarning, match=".*".join(fields) + ".* change training alone and are passed"
    ):
        found = load(tmp_path, "stacked")
    silent = load(tmp_path, "stacked", ignore=tuple(fields))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(silent)))


def test_layers_of_a_stack_that_have_no_adapter_stay_as_they_are(tmp_path):
    write(
        tmp_path,
        LORA | {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        plain_lora([Q.format(1)]),
    )
    adaptation, params = load(tmp_path, "stacked"), tree(WEIGHTS, "stacked")
    (own,) = dict(adaptation.matrices).values()
    assert own.ranks == (0, 2) and adaptation.trained == 2 * (8 + 4)
    kernel = merged(params, adaptation)["layers"]["attention"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[0], WEIGHTS[Q.format(0)].T)
    assert np.abs(kernel[1] - WEIGHTS[Q.format(1)].T).max() > 1e-3
    peft.save(tmp_path / "again", adaptation, params, llama.torch_name, views=VIEWS)
    assert {
        key.split(".lora")[0]
        for key in safetensors.read(tmp_path / "again" / "adapter_model.safetensors")
    } == {PREFIX + Q.format(1)}
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())[
        "target_modules"
    ] == [Q.format(1)]
    write(tmp_path, LORA | {"target_modules": ["q_proj"]}, plain_lora([Q.format(1)]))
    with pytest.raises(ValueError, match="lacks 2 tensors: .*layers.0.self_attn.q_proj.lora_A"):
        load(tmp_path, "stacked")


@pytest.mark.parametrize("form", FORMS)
def test_ranks_larger_than_a_dimension_are_loaded_and_written_though_adapt_refuses_them(
    form, tmp_path
):
    """PEFT takes any rank: 8 on a layer of two outputs is what its default makes of a
    classifier."""
    plain = plain_lora(rank=6) | plain_lora(MODULES[:1], 9)
    write(tmp_path, LORA | {"r": 6, "rank_pattern": {MODULES[0]: 9}}, plain)
    params = tree(WEIGHTS, form)
    adaptation = load(tmp_path, form)
    pairs = {m: (plain[f"{m}.lora_A.weight"], plain[f"{m}.lora_B.weight"]) for m in WEIGHTS}
    want = tree(
        {m: w + 2 / len(pairs[m][0]) * pairs[m][1] @ pairs[m][0] for m, w in WEIGHTS.items()}, form
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), merged(params, adaptation), want
    )
    peft.save(tmp_path / "again", adaptation, params, llama.torch_name, views=FORMS[form])
    again, once = (
        safetensors.read(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path)
    )
    assert {k: x.tolist() for k, x in again.items()} == {k: x.tolist() for k, x in once.items()}
    with pytest.raises(ValueError, match="rank=6 exceeds 4, the largest of lora on a 4 x 8 kernel"):
        lrx.adapt(
            params,
            {".*/q_proj/kernel": lrx.adapters.lora(rank=6)},
            jax.random.key(0),
            views=FORMS[form],
        )


def test_a_kernel_of_heads_and_convolutions_lie_as_torch_wants_them(tmp_path):
    params = {
        "q": {"kernel": jnp.ones((4, 2, 3))},
        "o": {"kernel": jnp.ones((2, 3, 4))},
        "conv": {"kernel": jnp.ones((3, 2, 5, 4))},
        "line": {"kernel": jnp.ones((3, 5, 4))},
        "table": {"embedding": jnp.ones((7, 4))},
    }
    rows = {
        "q": ((0,), (1, 2)),
        "o": ((0, 1), (2,)),
        "conv": ((0, 1, 2), (3,)),
        "line": ((0, 1), (2,)),
    }
    views = lrx.Views(
        rules=tuple((f"{k}/kernel", lrx.MatrixView(rows=r, cols=c)) for k, (r, c) in rows.items())
    )
    rules = {".*/kernel": lrx.adapters.lora(rank=2), "table/.*": lrx.adapters.lora(rank=2)}
    adaptation = jax.jit(lambda params: lrx.adapt(params, rules, jax.random.key(0), views=views))(
        params
    )
    train = {
        path: {k: normal(*x.shape) for k, x in own.items()}
        for path, own in adaptation.train["sites"].items()
    }
    adaptation = adaptation.replace(train=adaptation.train | {"sites": train})
    peft.save(tmp_path, adaptation, params, views=views, convolutions=("line/kernel",), head=None)
    found = safetensors.read(tmp_path / "adapter_model.safetensors")
    for key, want in {
        "q.lora_A.weight": train["q/kernel"]["a"].T,
        "q.lora_B.weight": train["q/kernel"]["b"].T,
        "o.lora_A.weight": train["o/kernel"]["a"].T,
        "conv.lora_A.weight": np.einsum(
            "hwcr->rchw", train["conv/kernel"]["a"].reshape(3, 2, 5, 2)
        ),
        "conv.lora_B.weight": train["conv/kernel"]["b"].T[:, :, None, None],
        "line.lora_A.weight": np.einsum("wcr->rcw", train["line/kernel"]["a"].reshape(3, 5, 2)),
        "table.lora_embedding_A": train["table/embedding"]["a"].T,
        "table.lora_embedding_B": train["table/embedding"]["b"].T,
    }.items():
        np.testing.assert_array_equal(found[PREFIX + key], want)
    back = peft.load(tmp_path, params, views=views, convolutions=("line/kernel",))
    jax.tree.map(np.testing.assert_array_equal, back.train["sites"], train)
    with pytest.raises(ValueError, match="line.lora_A.weight is .2, 5, 3., not .2, 15."):
        peft.load(tmp_path, params, views=views)
    with pytest.raises(ValueError, match="convolutions: .*'row/kernel'"):
        peft.load(tmp_path, params, views=views, convolutions=("row/kernel",))
    config = {"peft_type": "VERA", "r": 2, "target_modules": ["conv", "table"]}
    write(tmp_path, config, {"base_model.vera_A": normal(2, 2)})
    with pytest.raises(
        ValueError, match="VERA does not adapt modules of this kind: conv .conv., table .embedding."
    ):
        peft.load(tmp_path, params, views=views)


TARGETS = {
    "suffixes": (["q", "x.v"], {}, ["m.l.0.q", "m.l.1.q", "m.l.0.x.v", "m.l.1.x.v", "q"]),
    "not a part of a name": (["v"], {}, ["m.l.0.x.v", "m.l.1.x.v"]),
    "expression": (r".*\.1\..*", {}, ["m.l.1.q", "m.l.1.x.v"]),
    "expression, whole": ("m.l.1", {}, []),
    "all-linear": ("All-Linear", {}, ["m.l.0.q", "m.l.1.q", "m.l.0.x.v", "m.l.1.x.v", "q"]),
    "exclude": (["q"], {"exclude_modules": ["0.q"]}, ["m.l.1.q", "q"]),
    "exclude, expression": (["q"], {"exclude_modules": ".*0.*"}, ["m.l.1.q", "q"]),
    "saved whole": (["q"], {"modules_to_save": ["l.0"]}, ["m.l.1.q", "q"]),
    "layers": (["q", "v"], {"layers_to_transform": [1]}, ["m.l.1.q", "m.l.1.x.v", "q"]),
    "one layer": (["q"], {"layers_to_transform": 0}, ["m.l.0.q", "q"]),
    "pattern of layers": (
        ["q"],
        {"layers_to_transform": [1], "layers_pattern": "l"},
        ["m.l.1.q", "q"],
    ),
    "another pattern": (["v"], {"layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}, []),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(case):
    """By the rules of PEFT's `check_target_module_exists`."""
    targets, more, want = TARGETS[case]
    linear = dict.fromkeys(["m.l.0.q", "m.l.1.q", "m.l.0.x.v", "m.l.1.x.v", "q"], True) | {
        "table": False
    }
    config = {"target_modules": targets} | more
    if want:
        assert sorted(_peft_config.targeted(config, linear, [])) == sorted(want)
    else:
        with pytest.raises(ValueError, match="takes none of the modules"):
            _peft_config.targeted(config, linear, [])


def test_targets_and_patterns_that_are_written_take_just_what_they_should():
    modules = ["q", "x.q", "x.v", "y.v", "x"]
    for adapted in (["x.q", "q"], ["q"], ["x.v", "y.v"], ["x.v"], ["x.q"]):
        written = _peft_config.target_modules(adapted, modules)
        assert [m for m in modules if _peft_config.matches(written, m)] == [
            m for m in modules if m in adapted
        ]
    values = {"q": 1, "x.q": 2, "x.v": 2, "a+.v": 3}
    patterns = _peft_config.pattern_of(values, 2)
    assert {m: _peft_config.by_pattern(patterns, m, 2) for m in values} == values


def test_starts_from_the_kernel(tmp_path):
    """A file of PiSSA without conversion belongs to the base less its best part of rank r; ours is
    LoRA of rank 2 r."""
    tensors = plain_lora()
    config = LORA | {"init_lora_weights": "pissa", "lora_alpha": 3, "rank_pattern": {}}
    adaptation, params = load(write(tmp_path, config, tensors), "stacked"), tree(WEIGHTS, "stacked")
    want = {}
    for m, w in WEIGHTS.items():
        u, s, vt = np.linalg.svd(w)
        t = of_module(tensors, m)
        want[m] = w - (u[:, :2] * s[:2]) @ vt[:2] + 1.5 * t["lora_B.weight"] @ t["lora_A.weight"]
    close = lambda ours, wanted: np.testing.assert_allclose(ours, wanted, atol=2e-5)  # noqa: E731
    jax.tree.map(close, merged(params, adaptation), tree(want, "stacked"))
    peft.save(tmp_path, adaptation, params, llama.torch_name, views=VIEWS)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (4, 6, True)
    jax.tree.map(close, merged(params, load(tmp_path, "stacked")), tree(want, "stacked"))


def test_weights_are_worked_in_and_halves_are_read_as_floats(tmp_path):
    tensors = {key: x.astype(jnp.bfloat16) for key, x in plain_lora().items()}
    adaptation, params = load(write(tmp_path, LORA, tensors), "stacked"), tree(WEIGHTS, "stacked")
    leaves = jax.tree.leaves(adaptation.train)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")} and leaves
    weights = jnp.array([0.5, 0.0])
    fixed = {
        path: own | {"scale": own["scale"] * weights}
        for path, own in adaptation.frozen["sites"].items()
    }
    weighted, more = (
        adaptation.replace(frozen={"shared": {}, "sites": fixed}),
        {"fan_in_fan_out": True},
    )
    peft.save(
        tmp_path, weighted, params, llama.torch_name, views=VIEWS, task_type="CAUSAL_LM", **more
    )
    found = safetensors.read(tmp_path / "adapter_model.safetensors")
    for m in MODULES:
        b = tensors[f"{m}.lora_B.weight"].astype(np.float32)
        np.testing.assert_array_equal(
            found[f"{PREFIX}{m}.lora_B.weight"], b * np.array([0.5, 0.0], np.float32)
        )
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["fan_in_fan_out"], written["task_type"], written["lora_alpha"]) == (
        True,
        "CAUSAL_LM",
        2,
    )
    off = {path: own | {"scale": own["scale"] * 0} for path, own in fixed.items()}
    off = adaptation.replace(frozen={"shared": {}, "sites": off})
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj' is switched off"):
        peft.save(tmp_path, off, params, llama.torch_name, views=VIEWS)


def test_modules_saved_whole_and_biases(tmp_path):
    params = whole_params()
    tensors = {"body.up.lora_A.weight": normal(2, 4), "body.up.lora_B.weight": normal(6, 2)}
    more = {
        "head.weight": normal(3, 4),
        "head.bias": normal(3),
        "body.up.base_layer.bias": normal(6),
    }
    config = LORA | {"target_modules": ["up"], "modules_to_save": ["head"], "bias": "lora_only"}
    adaptation = peft.load(write(tmp_path, config, tensors | more), params)
    assert sorted(adaptation.train["trainable"]) == ["body/up/bias", "head/bias", "head/kernel"]
    np.testing.assert_array_equal(
        adaptation.train["trainable"]["head/kernel"], more["head.weight"].T
    )
    np.testing.assert_array_equal(
        adaptation.train["trainable"]["body/up/bias"], more["body.up.base_layer.bias"]
    )
    peft.save(tmp_path / "again", adaptation, params)
    again = safetensors.read(tmp_path / "again" / "adapter_model.safetensors")
    assert {k: x.tolist() for k, x in again.items()} == {
        PREFIX + k: x.tolist() for k, x in (tensors | more).items()
    }
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (written["modules_to_save"], written["bias"]) == (["head"], "lora_only")
    # of a module that is trained in part PEFT wants all
    part = {"head/kernel": adaptation.train["trainable"]["head/kernel"]}
    part = adaptation.replace(train=adaptation.train | {"trainable": part})
    peft.save(tmp_path / "part", part, params)
    found = safetensors.read(tmp_path / "part" / "adapter_model.safetensors")
    np.testing.assert_array_equal(found[f"{PREFIX}head.bias"], params["head"]["bias"])
    assert f"{PREFIX}body.up.base_layer.bias" not in found
    # what PEFT writes along with the base is compared with it
    copies = {"body.down.weight": np.asarray(params["body"]["down"]["kernel"]).T}
    assert sorted(
        peft.load(write(tmp_path, config, tensors | more | copies), params).train["trainable"]
    )
    with pytest.raises(ValueError, match="parameters of its base that differ .*body.down.weight"):
        peft.load(
            write(tmp_path, config, tensors | more | {"body.down.weight": normal(4, 6)}), params
        )


def test_square_weights_that_may_be_transposed(tmp_path):
    params = {"up": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 4))}}
    tensors = {
        "up.lora_A.weight": normal(2, 4),
        "up.lora_B.weight": normal(4, 2),
        "head.weight": normal(4, 4),
    }
    config = LORA | {"target_modules": ["up"], "modules_to_save": ["head"]}
    adaptation = peft.load(write(tmp_path, config, tensors), params)
    message = "fan_in_fan_out=True: nothing says whether the square .'head.weight'."
    with pytest.raises(ValueError, match=message):
        peft.load(write(tmp_path, config | {"fan_in_fan_out": True}, tensors), params)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path, adaptation, params, fan_in_fan_out=True)


def test_every_bias(tmp_path):
    params = whole_params()
    tensors = {"body.up.lora_A.weight": normal(2, 4), "body.up.lora_B.weight": normal(6, 2)}
    biases = {
        "body.up.base_layer.bias": normal(6),
        "body.norm.bias": normal(6),
        "body.down.bias": normal(4),
    }
    config = LORA | {"target_modules": ["up"], "bias": "all"}
    write(tmp_path, config, tensors | biases | {"head.bias": normal(3)})
    adaptation = peft.load(tmp_path, params)
    assert sorted(adaptation.train["trainable"]) == [
        "body/down/bias",
        "body/norm/bias",
        "body/up/bias",
        "head/bias",
    ]
    peft.save(tmp_path / "again", adaptation, params)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["bias"] == "all"
    # with a module saved whole PEFT stores its bias three times
    saved = {"head.weight": normal(3, 4), "head.bias": normal(3)}
    thrice = {
        "head.original_module.bias": normal(3),
        "head.modules_to_save.bias": saved["head.bias"],
    }
    write(tmp_path, config | {"modules_to_save": ["head"]}, tensors | biases | saved | thrice)
    assert "head/kernel" in peft.load(tmp_path, params).train["trainable"]


@pytest.mark.parametrize("name", ["lora", "vera", "uni_lora", "fourierft"])
def test_numbers_of_numpy_are_written_as_pythons(name, tmp_path):
    options = {
        "lora": {"rank": 2, "alpha": 3.0, "dropout": 0.5},
        "vera": {"rank": 2, "seed": 3},
        "uni_lora": {"rank": 2, "size": 8},
        "fourierft": {"frequencies": 5, "alpha": 6.0, "seed": 3},
    }[name]
    params = {"up": {"kernel": jnp.asarray(normal(4, 6))}}
    single = {int: np.int64, float: np.float32}
    of_numpy = {field: single[type(value)](value) for field, value in options.items()}
    for folder, given in (("python", options), ("numpy", of_numpy)):
        adaptation = lrx.adapt(params, getattr(lrx.adapters, name)(**given), jax.random.key(0))
        peft.save(tmp_path / folder, adaptation, params)
    texts = [
        (tmp_path / folder / "adapter_config.json").read_text() for folder in ("python", "numpy")
    ]
    assert json.loads(texts[0]) == json.loads(texts[1])


def test_a_field_that_json_cannot_say_leaves_no_half_of_a_folder(tmp_path):
    params = {"up": {"kernel": jnp.asarray(normal(4, 6))}}
    adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    with pytest.raises(
        ValueError,
        match=r"auto_mapping=\{'x': <object .* cannot be written as JSON: .*leave it out",
    ):
        peft.save(tmp_path, adaptation, params, auto_mapping={"x": object()})
    assert not list(tmp_path.iterdir())
