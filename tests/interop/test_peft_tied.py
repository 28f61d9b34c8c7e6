"""PEFT folders for a tree whose table is the output layer too, written by hand; without PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.interop import peft, safetensors
from tests.interop.peft_files import LORA, PREFIX, normal, write

TABLE, BODY = normal(9, 4), normal(4, 4)
PARAMS = {"embed_tokens": {"embedding": jnp.asarray(TABLE)}, "up": {"kernel": jnp.asarray(BODY)}}
UNTIED = PARAMS | {"lm_head": {"kernel": jnp.asarray(TABLE.T)}}
A, B, COPY = normal(2, 9), normal(4, 2), normal(9, 4)
LOOK_UP = {"embed_tokens.lora_embedding_A": A, "embed_tokens.lora_embedding_B": B}
HEAD = {"lm_head.lora_A.weight": B.T.copy(), "lm_head.lora_B.weight": A.T.copy()}
UP = {"up.lora_A.weight": normal(2, 4), "up.lora_B.weight": normal(4, 2)}
BASE = {"embed_tokens.base_layer.weight": TABLE, "lm_head.base_layer.weight": TABLE}
CONFIG = LORA | {"lora_alpha": 6, "target_modules": ["embed_tokens"]}
TIED = CONFIG | {"ensure_weight_tying": True}
SAVED = LORA | {"target_modules": ["up"], "modules_to_save": ["embed_tokens"]}
PATH = "embed_tokens/embedding"


def uses(adaptation):
    return {site.path: site.uses for site in adaptation.layout.sites}[PATH]


def parts(adaptation, params=PARAMS):
    """What the look-up and the output layer are."""
    table = lrx.attach(params, adaptation)["embed_tokens"]["embedding"]
    return lrx.adapters.embed(jnp.arange(9), table), lrx.adapters.attend(jnp.eye(4), table).T


@pytest.mark.parametrize(
    "config, tensors, wanted, both",
    [
        (CONFIG, LOOK_UP, ("gather",), False),
        (CONFIG, LOOK_UP | {"embed_tokens.base_layer.weight": TABLE}, ("gather",), False),
        (TIED, LOOK_UP, ("gather",), False),
        (TIED, LOOK_UP | HEAD, (), True),
        (TIED, LOOK_UP | HEAD | BASE, (), True),
    ],
    ids=["look-up", "with its base", "not tied by PEFT", "both", "both with their base"],
)
def test_where_an_adapter_of_the_table_acts(config, tensors, wanted, both, tmp_path):
    adaptation = peft.load(write(tmp_path, config, tensors), PARAMS)
    assert uses(adaptation) == wanted
    changed = TABLE + 3 * A.T @ B.T
    for found, want in zip(parts(adaptation), (changed, changed if both else TABLE), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-6)
    peft.save(tmp_path / "again", adaptation, PARAMS)
    again = safetensors.read(tmp_path / "again" / "adapter_model.safetensors")
    once = {PREFIX + key: x.tolist() for key, x in tensors.items() if "base_layer" not in key}
    assert {key: x.tolist() for key, x in again.items()} == once
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (
        written["target_modules"] == ["embed_tokens"]
        and written.get("ensure_weight_tying", False) is both
    )
    assert uses(peft.load(tmp_path / "again", PARAMS)) == wanted


def test_a_copy_of_the_table_for_both_trains_whole(tmp_path):
    tensors = UP | {"embed_tokens.weight": COPY, "lm_head.weight": COPY}
    adaptation = peft.load(write(tmp_path, SAVED | {"ensure_weight_tying": True}, tensors), PARAMS)
    np.testing.assert_array_equal(adaptation.train["trainable"][PATH], COPY)
    peft.save(tmp_path / "again", adaptation, PARAMS)
    again = safetensors.read(tmp_path / "again" / "adapter_model.safetensors")
    assert {key: x.tolist() for key, x in again.items()} == {
        PREFIX + key: x.tolist() for key, x in tensors.items()
    }
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["ensure_weight_tying"]
        is True
    )


def test_a_tree_with_an_output_layer_of_its_own_has_every_file(tmp_path):
    both = CONFIG | {"target_modules": ["embed_tokens", "lm_head"]}
    adaptation = peft.load(write(tmp_path, both, LOOK_UP | HEAD), UNTIED)
    assert all(site.uses == () for site in adaptation.layout.sites)
    merged = lrx.merge(UNTIED, adaptation)
    np.testing.assert_allclose(
        merged["lm_head"]["kernel"], merged["embed_tokens"]["embedding"].T, atol=1e-6
    )
    adaptation = peft.load(write(tmp_path, SAVED, UP | {"embed_tokens.weight": COPY}), UNTIED)
    np.testing.assert_array_equal(lrx.merge(UNTIED, adaptation)["lm_head"]["kernel"], TABLE.T)
    # so says the caller where no output layer shares the table
    adaptation = peft.load(write(tmp_path, CONFIG, LOOK_UP), PARAMS, head=None)
    merged = lrx.merge(PARAMS, adaptation)["embed_tokens"]["embedding"]
    np.testing.assert_allclose(merged, TABLE + 3 * A.T @ B.T, atol=1e-6)


def test_an_encoder_shares_no_table(tmp_path):
    """Its words may be those of an output layer, which the caller denies; positions and token types
    never are."""
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    params = {"embeddings": {name: {"embedding": jnp.asarray(TABLE)} for name in names}}

    def of(name):
        return {
            f"embeddings.{name}.lora_embedding_A": A,
            f"embeddings.{name}.lora_embedding_B": B,
        }

    folder = write(
        tmp_path,
        CONFIG | {"target_modules": list(names)},
        of(names[0]) | of(names[1]) | of(names[2]),
    )
    adaptation = peft.load(folder, params)
    assert [site.uses for site in adaptation.layout.sites] == [()] * 2 + [("gather",)]
    with pytest.raises(
        ValueError, match=r"\{'embeddings/word_embeddings/embedding': .*peft.load\(.*head=None\)"
    ):
        lrx.merge(params, adaptation)
    for table in jax.tree.leaves(lrx.merge(params, peft.load(folder, params, head=None))):
        np.testing.assert_allclose(table, TABLE + 3 * A.T @ B.T, atol=1e-6)
    rules = {f"embeddings/{name}/embedding": FEW for name in names[1:]}
    peft.save(tmp_path / "again", lrx.adapt(params, rules, jax.random.key(0)), params)
    whole = SAVED | {"target_modules": [names[1]], "modules_to_save": [names[2]]}
    tensors = of(names[1]) | {f"embeddings.{names[2]}.weight": COPY}
    found = peft.load(write(tmp_path, whole, tensors), params).train["trainable"]
    np.testing.assert_array_equal(found[f"embeddings/{names[2]}/embedding"], COPY)


REMEDY = (
    ".*give the output layer 'lm_head' a kernel of its own in params, the transposed table of "
    "'embed_tokens'.*None"
)
LOADS = {
    "head alone": ("adapts or trains the output layer 'lm_head' by itself" + REMEDY, CONFIG, HEAD),
    "both apart": ("by itself" + REMEDY, CONFIG, LOOK_UP | HEAD),
    "copy": ("copy of the table of 'embed_tokens' that PEFT gives to the look-up alone" + REMEDY, SAVED, UP | {
        "embed_tokens.weight": COPY}),
    "copies apart": ("by itself" + REMEDY, SAVED, UP | {"embed_tokens.weight": COPY, "lm_head.weight": TABLE}),
    "no transposes": ("lm_head.lora_A.weight.*not both transposes of a table's factors", TIED, LOOK_UP | HEAD | {
        "lm_head.lora_A.weight": normal(2, 4)}),
    "one factor": ("lora_A.weight: not both transposes.*the file is damaged", TIED, LOOK_UP | {
        "lm_head.lora_A.weight": B.T.copy()}),
    "a tensor more": ("lm_head.foo, .*lora_A.*the file is damaged", TIED, LOOK_UP | HEAD | {"lm_head.foo": A}),
    "another tensor": ("lm_head.foo: .*the file is damaged", TIED, LOOK_UP | {"lm_head.foo": A}),
    "another copy": ("nor its copy: the file is damaged", SAVED | {"ensure_weight_tying": True}, UP | {
        "embed_tokens.weight": COPY, "lm_head.weight": TABLE}),
    "another base": ("parameters of its base that differ.*lm_head.base_layer.weight", TIED, LOOK_UP | HEAD | {
        "lm_head.base_layer.weight": COPY}),
    "magnitudes": ("'lm_head' has magnitudes of its own" + REMEDY, TIED | {"use_dora": True}, LOOK_UP | HEAD | {
        "embed_tokens.lora_magnitude_vector": normal(4), "lm_head.lora_magnitude_vector": normal(9)}),
    "scales": (r"rank and alpha are \(2, 6\) for 'embed_tokens' and \(2, 3\) for 'lm_head'" + REMEDY, TIED | {
        "alpha_pattern": {"lm_head": 3}}, LOOK_UP | HEAD),
    "starts": ("init_lora_weights='pissa': its start changes the table", TIED | {"init_lora_weights": "pissa"},
               LOOK_UP | HEAD),
    "methods": ("ensure_weight_tying=True. ignore=", {"peft_type": "HIRA", "r": 2, "ensure_weight_tying": True,
                                                     "target_modules": ["embed_tokens"]}, LOOK_UP),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADS)
def test_what_one_leaf_cannot_say_is_not_loaded(case, tmp_path):
    expected, config, tensors = LOADS[case]
    with pytest.raises(ValueError, match=expected):
        peft.load(write(tmp_path, config, tensors), PARAMS)


FEW = lrx.adapters.lora(rank=2)
OTHER = {"table": PARAMS["embed_tokens"], "up": PARAMS["up"]}
SAVES = {
    "method": ({PATH: lrx.adapters.hira(rank=2)}, {}, "'embed_tokens' is adapted as the look-up and as the output la"),
    "magnitudes": ({PATH: lrx.adapters.dora(rank=2)}, {}, "'embed_tokens' has DoRA as the look-up and as the output"),
    "in full": ({"up/kernel": lrx.adapters.hira(rank=2)}, {"trainable": PATH}, "'embed_tokens' is trained as the look"),
    "output layer": ({PATH: FEW}, {"uses": {PATH: ("dot_general",)}}, r"adapted at \('dot_general',\), which no PEFT"),
    "kernel": ({"up/kernel": FEW}, {"uses": {"up/.*": ("gather",)}}, r"'up/kernel' is adapted at \('gather',\), which"),
    "name": ({"table/embedding": FEW}, {}, "'table' is adapted as .* but for LoRA on a table named 'embed_tokens' wi"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVES)
def test_what_peft_cannot_say_is_not_written(case, tmp_path):
    rules, options, expected = SAVES[case]
    params = OTHER if case == "name" else PARAMS
    adaptation = lrx.adapt(params, rules, jax.random.key(0), **options)
    with pytest.raises(ValueError, match=expected):
        peft.save(tmp_path, adaptation, params)
    assert not list(tmp_path.iterdir())


def test_a_pattern_of_targets_matches_the_bare_name_by_which_peft_ties(tmp_path):
    params = {"m": PARAMS, "x": {"embed_tokens": {"kernel": jnp.ones((4, 4))}}}
    adaptation = lrx.adapt(params, {f"m/{PATH}": FEW}, jax.random.key(0))
    peft.save(tmp_path, adaptation, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["m.embed_tokens"]

    def names(path, index=None):
        return {f"m/{PATH}": "embed_tokens.weight"}.get(path) or peft.linen_name(path)

    peft.save(tmp_path, adaptation, params, names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["target_modules"] == r"embed_tokens|embed_tokens"
        and config["ensure_weight_tying"] is True
    )
