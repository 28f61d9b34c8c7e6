"""Which modules, ranks and candidates PEFT makes of a configuration, against PEFT itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx
from lowrank_jax.interop import _peft_config
from lowrank_jax.interop import peft as bridge
from tests.peer.peft_net import (
    FAST,
    FILES,
    IDS,
    QUIET,
    Net,
    compare,
    loaded,
    our_outputs,
    peft,
    randomise,
    randomised,
    torch,
    torch_outputs,
    tree_of,
)

pytestmark = QUIET
MODULES = [
    "layers.0.q",
    "layers.1.q",
    "layers.1.x.v",
    "m.layers.0.q",
    "m.layers.1.q",
    "m.h.1.experts.0.q",
    "q",
    "m.v",
]
TARGETS = [["q"], ["q", "m.layers.0.q"], ["layers.0.q", "v"], r".*\.q", ["x.v", "layers.1.x.v"]]
LAYERS = [None, [], 1, [0], [1, 2]]
PATTERNS = [None, "", "layers", ["h", "layers"], "blocks"]


def test_targets_are_those_of_peft():
    theirs = peft.tuners.tuners_utils.check_target_module_exists
    found = 0
    for targets, layers, pattern in itertools.product(TARGETS, LAYERS, PATTERNS):
        fields = {
            "target_modules": targets,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        others = dict.fromkeys(["exclude_modules", "modules_to_save", "target_parameters"])
        config = type("Config", (), fields | others)
        for module in MODULES:
            want = bool(theirs(config, module))
            assert _peft_config.is_targeted(fields, module, True) is want, (fields, module)
            found += want
    assert 100 < found < 900


@pytest.mark.parametrize("pattern", [{"lin0": 3}, {"lin0": 1}, {}], ids=str)
def test_hira_of_ranks_by_module(pattern, tmp_path):
    """PEFT makes every module of rank r; what we save with ranks by module is padded to the
    largest."""
    config = peft.HiraConfig(r=2, target_modules=["emb", "lin0", "lin1"], rank_pattern=pattern)
    model = peft.get_peft_model(Net(), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    params = tree_of(Net())
    adaptation = bridge.load(tmp_path, params, **FILES)
    compare(our_outputs(params, adaptation), torch_outputs(model), torch_outputs(Net()))
    own = lrx.adapt(
        params,
        {"(emb|lin.)/(embedding|kernel)": lrx.adapters.hira(rank=2)},
        jax.random.key(0),
        ranks={f"{name}/kernel": rank for name, rank in pattern.items()},
    )
    own = randomised(own)
    bridge.save(tmp_path / "ours", own, params, **FILES)
    compare(
        our_outputs(params, own), torch_outputs(loaded(tmp_path / "ours")), torch_outputs(Net())
    )


def test_training_alone(tmp_path):
    """Dropouts that we do not have: the function is PEFT's, and a warning names them."""
    for config in (
        peft.HiraConfig(r=2, target_modules=["lin0"], hira_dropout=0.3),
        peft.LoHaConfig(r=2, target_modules=["lin0"], module_dropout=0.3, rank_dropout=0.2),
        peft.OFTConfig(oft_block_size=4, target_modules=["lin0"], module_dropout=0.3),
    ):
        model = peft.get_peft_model(Net(), config)
        randomise(model)
        model.save_pretrained(tmp_path / config.peft_type.value)
        params = tree_of(Net())
        with pytest.warns(UserWarning, match="dropout=0.[32] change training alone"):
            adaptation = bridge.load(tmp_path / config.peft_type.value, params, **FILES)
        compare(our_outputs(params, adaptation), torch_outputs(model), torch_outputs(Net()))


def test_adapters_of_different_targets_in_one_batch(tmp_path):
    """PEFT's mixed batch: row by row an adapter by name, or the base."""
    names = {"a": ["lin0"], "b": ["lin1", "emb"], "c": ["lin0", "lin1"]}
    model = None
    for name, targets in names.items():
        config = peft.LoraConfig(r=2, target_modules=targets)
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora" in key:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    params = tree_of(Net())
    ones = {name: bridge.load(tmp_path / name, params, name=name, **FILES) for name in names}
    both = lrx.adapters.candidates(ones)
    rows = [*names, None]
    ids = np.stack([IDS[0]] * len(rows))

    def hidden(params):
        x = lrx.adapters.embed(jnp.asarray(ids), params["emb"]["embedding"])
        x = jnp.tanh(lrx.matmul(x, params["lin0"]["kernel"]) + params["lin0"]["bias"])
        return lrx.matmul(x, params["lin1"]["kernel"])

    chosen = lrx.adapters.candidate_ids(both, rows)
    run = jax.jit(lambda params, both: hidden(lrx.attach(params, both, ids=chosen)), **FAST)
    ours = np.asarray(run(params, both))

    def states(ids):
        base = model.base_model.model
        return base.lin1(torch.tanh(base.lin0(base.emb(ids))))

    for row, name in enumerate(rows):
        with torch.no_grad():
            model.eval().set_adapter(name) if name else model.base_model.disable_adapter_layers()
            np.testing.assert_allclose(
                ours[row], states(torch.from_numpy(ids[row])).numpy(), atol=2e-6
            )
