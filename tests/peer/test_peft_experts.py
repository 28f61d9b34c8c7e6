"""Experts that torch holds in one parameter, against PEFT's wrapper of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx
from lowrank_jax.interop import peft as bridge
from tests.peer.peft_net import QUIET, compare, loaded, peft, randomise, torch

# PEFT 0.21.2 looks for patterns among modules alone, and says of those of parameters that they were
# ignored, while it obeys them.
OBEYED = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
pytestmark = [QUIET, OBEYED]
EXPERTS, D, F, RANK = 3, 6, 4, 2
X = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)


class Experts(torch.nn.Module):
    """All experts of all rows, summed; both layouts that transformers has."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shapes = {"gate_up_proj": (EXPERTS, D, F), "down_proj": (EXPERTS, F, D)}
        for name, (experts, n, m) in shapes.items():
            shape = (experts, n, m) if is_transposed else (experts, m, n)
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        hidden = torch.tanh(torch.einsum("bd,edf->ebf", x, up))
        return torch.einsum("ebf,efd->bd", hidden, down)


class Net(torch.nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(is_transposed)
        self.lin = torch.nn.Linear(D, 3, bias=False)

    def forward(self, x):
        return self.lin(self.experts(x))


def params_of(net):
    """Kernels `(E, n, m)` and `(n, m)`."""
    turned = (lambda w: w) if net.experts.is_transposed else (lambda w: w.transpose(1, 2))
    found = {name: turned(w.detach()).numpy() for name, w in net.experts.named_parameters()}
    return jax.tree.map(jnp.asarray, {"experts": found, "lin": net.lin.weight.detach().numpy().T})


def model(params, x):
    hidden = jnp.tanh(jnp.einsum("bd,edf->ebf", x, params["experts"]["gate_up_proj"]))
    return jnp.einsum("ebf,efd->bd", hidden, params["experts"]["down_proj"]) @ params["lin"]


def names(path, index):
    return "lin.weight" if path == "lin" else f"{path.replace('/', '.')}[{index}]"


STACK = lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))
VIEWS = lrx.Views(
    rules={
        "experts/gate_up_proj": STACK,
        "experts/down_proj": STACK,
        "lin": lrx.MatrixView(rows=(0,), cols=(1,)),
    }
)
OPTIONS = {"views": VIEWS, "head": None}


def ours(params, adaptation):
    """Thin products, which effective kernels must agree with."""
    thin = lrx.adapted(model)(lrx.attach(params, adaptation), X)
    np.testing.assert_allclose(thin, model(lrx.effective(params, adaptation), X), rtol=1e-4)
    return np.asarray(thin)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj"], ["down_proj"], ["gate_up_proj", "experts.down_proj"]]
)
def test_a_file_of_peft_gives_what_peft_gives(targets, is_transposed, tmp_path):
    net = Net(is_transposed)
    params, base = params_of(net), net(torch.tensor(X)).detach().numpy()
    pattern = {"down_proj": 3} if len(targets) == 2 else {}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["lin"], target_parameters=targets,
        rank_pattern=pattern,
    )  # fmt: skip
    wrapped = peft.get_peft_model(net, config)
    randomise(wrapped)
    theirs = wrapped(torch.tensor(X)).detach().numpy()
    wrapped.save_pretrained(tmp_path)
    compare(ours(params, bridge.load(tmp_path, params, names, **OPTIONS)), theirs, base)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("paths", [["experts/gate_up_proj"], ["experts/.*"], ["experts/.*", "lin"]])
def test_peft_gives_what_our_file_holds(paths, is_transposed, tmp_path):
    net = Net(is_transposed)
    params, base = params_of(net), net(torch.tensor(X)).detach().numpy()
    rules = dict.fromkeys(paths, lrx.adapters.lora(rank=RANK, alpha=3))
    adaptation = lrx.adapt(params, rules, jax.random.key(0), views=VIEWS)
    moved = adaptation.replace(train=jax.tree.map(lambda x: x + 0.3, adaptation.train))
    bridge.save(tmp_path, moved, params, names, **OPTIONS)
    theirs = loaded(tmp_path, net)(torch.tensor(X)).detach().numpy()
    compare(ours(params, moved), theirs, base)
