"""Adapters against Hugging Face PEFT, through its own files: what it saves we load, what we save it
loads.

Every method runs both ways with random arrays, and the outputs of both models are compared. So PEFT
is an oracle of the adapters themselves, too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx
from lowrank_jax.interop import peft as bridge
from tests.peer.peft_net import (
    EVERY,
    FILES,
    LINEAR,
    QUIET,
    Net,
    adapted,
    compare,
    loaded,
    on,
    our_outputs,
    peft,
    randomise,
    randomised,
    torch,
    torch_outputs,
    tree_of,
)

pytestmark = QUIET


# what PEFT saves and we load: a configuration
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY),
    "rank and alpha patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=EVERY, rank_pattern={"lin0": 2, "^conv.$": 3}, alpha_pattern={"lin.|emb": 5}
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=EVERY, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY, use_dora=True),
    "rsdora": lambda: peft.LoraConfig(
        r=2, target_modules=EVERY, use_dora=True, use_rslora=True, rank_pattern={"emb": 3}
    ),
    "all-linear": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
    "regular expression": lambda: peft.LoraConfig(r=2, target_modules=r"lin\d|conv2"),
    "exclude": lambda: peft.LoraConfig(r=2, target_modules=EVERY, exclude_modules=["lin0", "emb"]),
    "biases": lambda: peft.LoraConfig(r=2, target_modules=EVERY, bias="lora_only"),
    "all biases": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, bias="all", modules_to_save=["head"]),
    "modules_to_save": lambda: peft.LoraConfig(
        r=2, target_modules=LINEAR, modules_to_save=["head", "norm", "conv2", "emb"]
    ),
    "mica": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="mica"),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa", rank_pattern={"lin1": 3}),
    "olora": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="olora", use_rslora=True),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=EVERY),
    "uni-lora": lambda: peft.UniLoraConfig(r=2, theta_d_length=24, target_modules=[*LINEAR, "head"]),
    "uni-lora, even": lambda: peft.UniLoraConfig(r=2, theta_d_length=10, target_modules=LINEAR, proj_seed=7),
    "uni-lora, unused entries": lambda: peft.UniLoraConfig(r=1, theta_d_length=64, target_modules=LINEAR),
    "uni-lora, indices": lambda: peft.UniLoraConfig(r=2, theta_d_length=24, target_modules=LINEAR, save_indices=True),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=[*LINEAR, "head"], bias="vera_only"),
    "vera, seed": lambda: peft.VeraConfig(r=5, target_modules=LINEAR, save_projection=False, projection_prng_key=9),
    "loha": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=EVERY[1:], rank_pattern={"conv1": 2}, alpha_pattern={"lin0": 2}
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False),
    "oft, neumann": lambda: peft.OFTConfig(oft_block_size=5, target_modules=LINEAR, use_cayley_neumann=True),
    "oft, blocks": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=LINEAR, bias="oft_only"),
    "miss": lambda: peft.MissConfig(r=5, target_modules=LINEAR, bias="MiSS_only"),
    "miss, mini": lambda: peft.MissConfig(r=3, mini_r=4, target_modules=LINEAR, init_weights="mini"),
    "miss, bat": lambda: peft.MissConfig(r=4, target_modules=LINEAR, init_weights="bat"),
    "fourierft": lambda: peft.FourierFTConfig(
        n_frequency=9, target_modules=LINEAR, n_frequency_pattern={"lin1": 13}, random_loc_seed=5, scaling=20.0
    ),
    "shira": lambda: peft.ShiraConfig(r=1, target_modules=LINEAR),
    "randlora": lambda: peft.RandLoraConfig(
        r=3, randlora_alpha=7, target_modules=[*LINEAR, "head"], bias="randlora_only"
    ),
    "randlora, seed": lambda: peft.RandLoraConfig(
        r=3, target_modules=LINEAR, save_projection=False, projection_prng_key=9
    ),
    "randlora, sparse": lambda: peft.RandLoraConfig(
        r=3, target_modules=LINEAR, save_projection=False, projection_prng_key=9, sparse=True
    ),
    "randlora, very sparse": lambda: peft.RandLoraConfig(r=4, target_modules=LINEAR, very_sparse=True),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_saves_we_load(case, tmp_path):
    config = THEIRS[case]()
    base, params = torch_outputs(Net()), tree_of(Net())
    model = peft.get_peft_model(Net(), config)
    randomise(model)
    theirs = torch_outputs(model)
    model.save_pretrained(tmp_path)
    order = [name for name, module in model.model.named_modules() if hasattr(module, "base_layer")]
    adaptation = bridge.load(tmp_path, params, order=order, **FILES)
    compare(our_outputs(params, adaptation), theirs, base)
    # and back again
    adaptation = randomised(adaptation)
    bridge.save(tmp_path / "ours", adaptation, params, **FILES)
    compare(our_outputs(params, adaptation), torch_outputs(loaded(tmp_path / "ours")), base)


# what we save and PEFT loads: rules, and options of adapt
OURS = {
    "lora": (on(EVERY, lrx.adapters.lora(rank=4, alpha=6)), {}),
    "ranks and alphas": (
        on(EVERY, lrx.adapters.lora(rank=4, alpha=6)),
        {"ranks": {"conv./.*": 3, "emb/.*": 2}, "alphas": {"lin0/.*": 5.0}},
    ),
    "rslora": (on(EVERY, lrx.adapters.lora(rank=4, alpha=3.0, rank_stabilized=True)), {}),
    "dora": (on(EVERY, lrx.adapters.dora(rank=4, alpha=6, dropout=0.1)), {"ranks": {"conv1/.*": 2}}),
    "dylora": (on(EVERY, lrx.adapters.dylora(rank=4, alpha=6)), {"ranks": {"conv1/.*": 2}}),
    "pissa": (
        on(LINEAR, lrx.adapters.lora(rank=2, init="pissa")), {"ranks": {"lin1/.*": 3}, "alphas": {"lin0/.*": 5.0}},
    ),
    "olora": (on(LINEAR, lrx.adapters.lora(rank=2, init="olora", rank_stabilized=True)), {"ranks": {"lin1/.*": 3}}),
    "biases": (on(EVERY, lrx.adapters.lora(rank=2)), {"bias": "adapted"}),
    "all biases": (on(LINEAR, lrx.adapters.lora(rank=2)), {"bias": "all"}),
    "in full": (
        on(LINEAR, lrx.adapters.lora(rank=2)), {"trainable": ("head/kernel", "norm/.*", "conv./kernel", "emb/.*")},
    ),
    "hira": (on(EVERY, lrx.adapters.hira(rank=3)), {}),
    "uni-lora": (on(LINEAR, lrx.adapters.uni_lora(rank=2, size=24)), {}),
    "vera": (on(LINEAR, lrx.adapters.vera(rank=5, seed=3)), {"bias": "adapted"}),
    "vera, key": (on(LINEAR, lrx.adapters.vera(rank=5, stored=False)), {}),
    "loha": (on(EVERY[1:], lrx.adapters.loha(rank=3, alpha=5)),
             {"ranks": {"conv2/.*": 2}, "alphas": {"conv1/.*": 2.0}}),
    "oft": (on(LINEAR, lrx.adapters.oft(block=4)), {}),
    "oft, neumann": (on(LINEAR, lrx.adapters.oft(block=4, cayley="neumann")), {}),
    "miss": (on(LINEAR, lrx.adapters.miss(rank=5)), {}),
    "miss, mini": (on(LINEAR, lrx.adapters.miss(rank=3, mode="mini", mini_rank=4)), {}),
    "miss, bat": (on(LINEAR, lrx.adapters.miss(rank=4, mode="bat")), {}),
    "fourierft": (
        {f"lin{i}/kernel": lrx.adapters.fourierft(frequencies=9 + 4 * i, alpha=20.0) for i in range(2)}, {},
    ),
    "shira": (on(LINEAR, lrx.adapters.shira(rank=1)), {}),
    "randlora": (on([*LINEAR, "head"], lrx.adapters.rand_lora(rank=3, alpha=7)), {"bias": "adapted"}),
    "randlora, paper": (on(LINEAR, lrx.adapters.rand_lora(rank=3, alpha=40, basis_normalized=True)), {}),
    "randlora, key": (on(LINEAR, lrx.adapters.rand_lora(rank=5, stored=False)), {}),
    "randlora, sparse": (on(LINEAR, lrx.adapters.rand_lora(rank=4, bases="sparse", seed=3)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_what_we_save_peft_loads(case, tmp_path):
    params = tree_of(Net())
    adaptation = adapted(params, *OURS[case])
    bridge.save(tmp_path, adaptation, params, **FILES)
    compare(our_outputs(params, adaptation), torch_outputs(loaded(tmp_path)), torch_outputs(Net()))


def test_weights_and_masks_are_worked_in(tmp_path):
    """A weight of 0.5, and ranks masked one by one."""
    params = tree_of(Net())
    for names, adapter in (
        (EVERY, lrx.adapters.dora(rank=4)),
        (EVERY, lrx.adapters.hira(rank=4)),
        (LINEAR, lrx.adapters.oft(block=4)),
    ):
        adaptation = adapted(params, on(names, adapter), {})
        scaled = jax.tree.map(lambda x: x, adaptation.frozen)
        for own in scaled["sites"].values():
            own["scale"] = own["scale"] * (
                jnp.array([1.0, 0.5, 0.0, 0.25]) if own["scale"].ndim else 0.5
            )
        adaptation = adaptation.replace(frozen=scaled)
        bridge.save(tmp_path, adaptation, params, **FILES)
        compare(
            our_outputs(params, adaptation), torch_outputs(loaded(tmp_path)), torch_outputs(Net())
        )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_offsets_that_peft_converted(init, tmp_path):
    """PEFT's own conversion to rank 2 r is what we write."""
    params, base = tree_of(Net()), torch_outputs(Net())
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=LINEAR, init_lora_weights=init)
    model = peft.get_peft_model(Net(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    randomise(model)
    theirs = torch_outputs(model)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    converted = bridge.load(tmp_path / "lora", params, **FILES)
    compare(our_outputs(params, converted), theirs, base)
    raw = bridge.load(tmp_path / "raw", params, **FILES)
    bridge.save(tmp_path / "ours", raw, params, **FILES)
    ours = bridge.load(tmp_path / "ours", params, **FILES)
    assert {adapter.rank for adapter in [*converted.layout.adapters, *ours.layout.adapters]} == {4}
    compare(our_outputs(params, ours), theirs, base)
    # absorbed, the rank stays and the base is another
    other, absorbed = lrx.adapters.absorb(params, raw)
    bridge.save(tmp_path / "absorbed", absorbed, other, **FILES)
    changed = Net()
    for name in LINEAR:
        getattr(changed, name).weight.data = torch.tensor(np.asarray(other[name]["kernel"]).T)
    again = loaded(tmp_path / "absorbed", changed)
    assert {again.peft_config["default"].r, *(adapter.rank for adapter in raw.layout.adapters)} == {
        2
    }
    compare(our_outputs(other, absorbed), torch_outputs(again), base)
    compare(torch_outputs(again), theirs, base)
