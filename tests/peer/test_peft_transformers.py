"""Adapters against Hugging Face PEFT on modules of transformers: LLaMA, scanned or not, and the
linear one of GPT-2."""

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
from tests.peer.peft_net import (
    FAST,
    QUIET,
    compare,
    convolve,
    loaded,
    peft,
    randomise,
    randomised,
    torch,
)

transformers = pytest.importorskip(
    "transformers", reason="needs Transformers: run `make test-peer`"
)

pytestmark = QUIET


class Transposed(torch.nn.Module):
    """GPT-2's kind of linear module, which stores its weight as `(n, m)`, and a 1 x 1
    convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = transformers.pytorch_utils.Conv1D(6, 8)
        self.mlp.weight.data *= 20
        self.point = torch.nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.point(torch.tanh(self.mlp(x)).mT[..., None])[..., 0].mT


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["mlp", "point"], fan_in_fan_out=True, use_dora=True),
        peft.HiraConfig(r=2, target_modules=["mlp"], fan_in_fan_out=True),
        peft.FourierFTConfig(n_frequency=7, target_modules=["mlp"], fan_in_fan_out=True),
        peft.OFTConfig(oft_block_size=2, target_modules=["point"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_transposed_modules_and_points(config, tmp_path):
    model, x = Transposed(), np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    params = {
        "mlp": {"kernel": jnp.asarray(model.mlp.weight.detach().numpy())},
        "point": {"kernel": jnp.asarray(model.point.weight.detach().numpy().transpose(2, 3, 1, 0))},
    }
    views = lrx.Views(rules=(("point/kernel", lrx.MatrixView(rows=(0, 1, 2), cols=(3,))),))

    def ours(params):
        y = jnp.tanh(lrx.matmul(x, params["mlp"]["kernel"]))
        one = convolve(2, window_strides=(1, 1), padding="SAME")
        return lrx.adapters.conv(y[:, :, None], params["point"]["kernel"], one)

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.from_numpy(x)).numpy()

    model.mlp.bias.data.zero_()
    model.point.bias.data.zero_()
    base = theirs(model)
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    adaptation = bridge.load(tmp_path, params, views=views)
    compare(np.asarray(ours(lrx.attach(params, adaptation)))[:, :, 0], theirs(wrapped), base)
    adaptation = randomised(adaptation)
    transposed = {} if config.peft_type == "OFT" else {"fan_in_fan_out": True}
    bridge.save(tmp_path / "ours", adaptation, params, views=views, **transposed)
    back = Transposed()
    back.mlp.bias.data.zero_()
    back.point.bias.data.zero_()
    compare(
        np.asarray(ours(lrx.attach(params, adaptation)))[:, :, 0],
        theirs(loaded(tmp_path / "ours", back)),
        base,
    )


TOKENS = np.random.default_rng(5).integers(0, 32, (2, 6))
STACKED = lrx.Views(stacked=("layers/.*",))
LLAMA = {
    "patterns": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=6, use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "1.mlp.down_proj": 3},
        alpha_pattern={r".*\.1\.self_attn\.\w*": 3},
    ),
    "layers": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[1], use_dora=True),
    "embeddings and norms": lambda: peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head", "k_proj"], modules_to_save=["norm"], bias="all"
    ),
    "uni-lora": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules="all-linear"),
}  # fmt: skip


def causal():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        attention_bias=True,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("case", LLAMA)
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unstacked"])
def test_llama(case, scan, tmp_path):
    base = causal()
    base.save_pretrained(tmp_path / "base")
    config, params = huggingface.load(tmp_path / "base", scan=scan)
    apply = jax.jit(Llama(config).apply, **FAST)
    files = {"names": llama.torch_name, "views": STACKED if scan else None}

    def ours(adaptation):
        return np.asarray(apply({"params": lrx.effective(params, adaptation)}, TOKENS))

    model = peft.get_peft_model(causal(), LLAMA[case]())
    randomise(model)
    theirs = logits(model)
    model.save_pretrained(tmp_path)
    adaptation = bridge.load(tmp_path, params, **files)
    compare(ours(adaptation), theirs, logits(base))
    adaptation = randomised(adaptation)
    options = {"save_indices": False} if case == "uni-lora" else {}
    bridge.save(tmp_path / "ours", adaptation, params, **files, **options)
    compare(ours(adaptation), logits(loaded(tmp_path / "ours", causal())), logits(base))
