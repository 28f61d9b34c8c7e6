"""Adapters of a table that the output layer shares, against Hugging Face PEFT on a tied LLaMA, in
both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx
from experiments.models import huggingface
from experiments.models.llama import Llama
from lowrank_jax.interop import llama
from lowrank_jax.interop import peft as bridge
from tests.peer.peft_net import FAST, QUIET, loaded, peft, randomised, torch

transformers = pytest.importorskip(
    "transformers", reason="needs Transformers: run `make test-peer`"
)

pytestmark = QUIET
TOKENS = np.random.default_rng(5).integers(0, 32, (2, 6))
LORA = functools.partial(peft.LoraConfig, r=2, lora_alpha=6)
FILES = {"names": llama.torch_name, "views": lrx.Views(stacked=("layers/.*",))}


def causal():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def moved(config):
    """PEFT's model with random numbers, written in place, so that what is tied stays so."""
    model = peft.get_peft_model(causal(), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn_like(parameter)
            parameter.data.copy_(parameter.data * (1 + noise) if "magnitude" in name else noise)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def parts(model):
    """What the look-up and the output layer are by themselves, for exact comparison."""
    rows, states = torch.arange(32), torch.eye(16)
    with torch.no_grad():
        head = (
            model.get_output_embeddings()
            if model.get_output_embeddings() is not None
            else model.lm_head
        )
        return model.eval().get_input_embeddings()(rows).numpy(), head(states).numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`(params, logits of (params, adaptation), look-up and output layer of them)` of the base in
    JAX."""
    folder = tmp_path_factory.mktemp("base")
    causal().save_pretrained(folder)
    config, params = huggingface.load(folder, scan=True)
    assert config.tied_head and "lm_head" not in params
    run = lrx.adapted(lambda params: Llama(config).apply({"params": params}, TOKENS))
    apply = jax.jit(lambda params, adaptation: run(lrx.attach(params, adaptation)), **FAST)

    def split(params, adaptation):
        table = lrx.attach(params, adaptation)["embed"]["embedding"]
        return lrx.adapters.embed(jnp.arange(32), table), lrx.adapters.attend(jnp.eye(16), table)

    return (
        params,
        lambda adaptation: np.asarray(apply(params, adaptation)),
        functools.partial(split, params),
    )


def close(ours, theirs, relative=1e-7):
    assert np.linalg.norm(ours - theirs) < relative * np.linalg.norm(theirs)


CASES = {
    "look-up": (lambda: LORA(target_modules=["embed_tokens", "q_proj"]), ("gather",)),
    "look-up, rslora": (lambda: LORA(target_modules=["embed_tokens"], use_rslora=True), ("gather",)),
    "look-up, dora": (lambda: LORA(target_modules=["embed_tokens"], use_dora=True), ("gather",)),
    "look-up, hira": (lambda: peft.HiraConfig(r=2, target_modules=["embed_tokens"]), ("gather",)),
    "both": (lambda: LORA(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), ()),
    "both, by the head": (lambda: LORA(target_modules=["lm_head"], ensure_weight_tying=True), ()),
    "both, by a pattern": (
        lambda: LORA(target_modules=r".*(embed_tokens|v_proj)", ensure_weight_tying=True, rank_pattern={"v_proj": 3}),
        (),
    ),
    "copy for both": (
        lambda: LORA(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_shared_table_is_adapted_where_peft_adapts_it(case, base, tmp_path):
    params, ours, split = base
    config, uses = CASES[case]
    model = moved(config())
    model.save_pretrained(tmp_path)
    adaptation = bridge.load(tmp_path, params, **FILES)
    sites = {site.path: site.uses for site in adaptation.layout.sites}
    assert sites.get("embed/embedding") == uses
    assert ("lora at gather" in str(adaptation)) == (case in ("look-up", "look-up, rslora"))
    theirs = logits(model)
    assert np.abs(theirs - logits(causal())).max() > 0.5
    close(ours(adaptation), theirs, 1e-6)
    for mine, wanted in zip(split(adaptation), parts(model.base_model.model), strict=True):
        close(mine, wanted)
    # and back
    adaptation = randomised(adaptation)
    bridge.save(tmp_path / "ours", adaptation, params, **FILES)
    close(logits(loaded(tmp_path / "ours", causal())), ours(adaptation), 1e-6)
    again = bridge.load(tmp_path / "ours", params, **FILES)
    assert again.layout.sites == adaptation.layout.sites
    assert all(map(np.array_equal, jax.tree.leaves(again.train), jax.tree.leaves(adaptation.train)))


REFUSED = {
    "head alone": (lambda: LORA(target_modules=["lm_head"]), "adapts or trains the output layer 'lm_head' by itself"),
    "both apart": (lambda: LORA(target_modules=["embed_tokens", "lm_head"]), "the output layer 'lm_head' by itself"),
    "magnitudes": (
        lambda: LORA(target_modules=["embed_tokens"], use_dora=True, ensure_weight_tying=True),
        "ensure_weight_tying=True with use_dora=True: 'lm_head' has magnitudes of its own",
    ),
    "copy for the look-up": (
        lambda: LORA(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "a copy of the table of 'model.embed_tokens' that PEFT gives to the look-up alone",
    ),
    "copy for the head": (
        lambda: LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "the output layer 'lm_head' by itself",
    ),
    "copies apart": (
        lambda: LORA(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), "'lm_head' by itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_leaf_cannot_say_is_refused_and_an_untied_tree_says_it(case, base, tmp_path):
    params, _, _ = base
    config, error = REFUSED[case]
    model = moved(config())
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=error + ".*a kernel of its own in params, the transposed table"
    ):
        bridge.load(tmp_path, params, **FILES)
    if case == "magnitudes":
        return  # the file says that they are tied, and its DoRA of both is another one for each
    untied = params | {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    adaptation = bridge.load(tmp_path, untied, **FILES)
    found = lrx.effective(untied, adaptation)  # a table of its own merges, too
    look_up, head = parts(model.base_model.model)
    close(found["embed"]["embedding"], look_up)
    close(found["lm_head"]["kernel"], head)


def test_scales_that_differ_between_the_two_modules_are_refused(base, tmp_path):
    config = LORA(
        target_modules=["embed_tokens"], ensure_weight_tying=True, alpha_pattern={"lm_head": 12}
    )
    moved(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"rank and alpha are \(2, 6\) for 'model.embed_tokens' and \(2, 12\) for 'lm",
    ):
        bridge.load(tmp_path, base[0], **FILES)


def test_saving_refuses_what_peft_cannot_say(base, tmp_path):
    params = base[0]
    adapt = functools.partial(lrx.adapt, params, key=jax.random.key(0), views=FILES["views"])
    table = "embed/embedding"
    for adaptation, error in (
        (
            adapt({table: lrx.adapters.hira(rank=2)}),
            "'model.embed_tokens' is adapted as the look-up and as the output",
        ),
        (
            adapt({table: lrx.adapters.dora(rank=2)}),
            "'model.embed_tokens' has DoRA as the look-up and as the output",
        ),
        (
            adapt({".*/q_proj/kernel": lrx.adapters.oft(block=2)}, trainable=table),
            "'model.embed_tokens' is trained as the",
        ),
        (
            adapt({table: lrx.adapters.lora(rank=2)}, uses={table: ("dot_general",)}),
            r"adapted at \('dot_general',\)",
        ),
    ):
        with pytest.raises(ValueError, match=error):
            bridge.save(tmp_path, adaptation, params, **FILES)
