"""A net of every kind of module that PEFT adapts, in torch and in JAX."""

import functools
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
peft = pytest.importorskip("peft", reason="needs PEFT: run `make test-peer`")

import lowrank_jax as lrx  # noqa: E402

torch.set_num_threads(1)
# of peft 0.21.2: hints of UserWarning, and its use of an attribute that transformers 5.24 calls
# otherwise
QUIET = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft",
    "ignore::UserWarning:torch",
    "ignore:.*is_gradient_checkpointing:FutureWarning",
)
FAST = {
    "compiler_options": {"xla_backend_optimization_level": 0}
}  # compiling is what takes time here
CONVOLUTIONS = {
    "conv1/kernel": lrx.MatrixView(rows=(0, 1), cols=(2,)),
    "conv2/kernel": lrx.MatrixView(rows=(0, 1, 2), cols=(3,)),
}
VIEWS = lrx.Views(rules=tuple(CONVOLUTIONS.items()))
FILES = {"views": VIEWS, "convolutions": ("conv1/kernel",)}


class Net(torch.nn.Module):
    """Every kind of module that PEFT adapts, in a net of two inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(11, 8)
        self.lin0 = torch.nn.Linear(8, 12)
        self.lin1 = torch.nn.Linear(12, 8, bias=False)
        self.conv1 = torch.nn.Conv1d(8, 6, 3, padding=1)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 5)
        self.conv2 = torch.nn.Conv2d(3, 4, (3, 2), stride=2, padding=1)

    def forward(self, ids, image):
        x = self.lin1(torch.tanh(self.lin0(self.emb(ids))))
        x = self.conv1(x.transpose(1, 2)).transpose(1, 2)
        return torch.cat([self.head(self.norm(x)).flatten(), self.conv2(image).flatten()])


def convolve(window, **options):
    layout = ("NHWC", "HWIO", "NHWC") if window == 2 else ("NWC", "WIO", "NWC")
    return lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=layout, **options)


def net(params, ids, image):
    """The same in JAX, on a tree that may hold adapters."""
    x = lrx.adapters.embed(ids, params["emb"]["embedding"])
    x = jnp.tanh(lrx.matmul(x, params["lin0"]["kernel"]) + params["lin0"]["bias"])
    x = lrx.matmul(x, params["lin1"]["kernel"])
    one = convolve(1, window_strides=(1,), padding=[(1, 1)])
    x = lrx.adapters.conv(x, params["conv1"]["kernel"], one) + params["conv1"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    x = lrx.matmul(x, params["head"]["kernel"]) + params["head"]["bias"]
    two = convolve(2, window_strides=(2, 2), padding=[(1, 1), (1, 1)])
    y = lrx.adapters.conv(image, params["conv2"]["kernel"], two) + params["conv2"]["bias"]
    return jnp.concatenate([x.ravel(), jnp.moveaxis(y, -1, 1).ravel()])


def tree_of(model):
    """The parameters of a torch model as a Flax tree, by the layouts of the kinds of module, not by
    the bridge."""
    tree = {}
    for name, module in model.named_children():
        weight = module.weight.detach().numpy()
        leaf = {torch.nn.Embedding: "embedding", torch.nn.LayerNorm: "scale"}.get(
            type(module), "kernel"
        )
        own = {
            leaf: jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2)) if leaf == "kernel" else weight)
        }
        if getattr(module, "bias", None) is not None:
            own["bias"] = jnp.asarray(module.bias.detach().numpy())
        tree[name] = own
    return tree


IDS = np.random.default_rng(1).integers(0, 11, (2, 5))
IMAGE = np.random.default_rng(2).normal(size=(2, 3, 6, 5)).astype(np.float32)


def torch_outputs(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS), torch.from_numpy(IMAGE)).numpy()


@functools.partial(jax.jit, **FAST)
def both_outputs(params, adaptation):
    inputs = jnp.asarray(IDS), jnp.asarray(np.moveaxis(IMAGE, 1, -1))
    return net(lrx.attach(params, adaptation), *inputs), net(
        lrx.effective(params, adaptation), *inputs
    )


def our_outputs(params, adaptation):
    attached, effective = both_outputs(params, adaptation)
    np.testing.assert_allclose(attached, effective, atol=2e-5)
    return np.asarray(attached)


def randomise(model):
    """Random numbers in everything that trains, the magnitudes of DoRA near what they are."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn_like(parameter)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise


def randomised(adaptation):
    generator = np.random.default_rng(4)

    def draw(path, x):
        noise = 0.3 * generator.normal(size=x.shape).astype(np.float32)
        return x * (1 + noise) if "magnitude" in str(path) else jnp.asarray(noise)

    return adaptation.replace(train=jax.tree_util.tree_map_with_path(draw, adaptation.train))


def compare(ours, theirs, base):
    """Equal, and not by doing nothing."""
    assert np.abs(theirs - base).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def loaded(folder, model=None):
    """What PEFT makes of a folder; a warning about its keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter keys).*")
        return peft.PeftModel.from_pretrained(model or Net(), str(folder))


EVERY = ["emb", "lin0", "lin1", "conv1", "conv2"]
LINEAR = ["lin0", "lin1"]
RULES = {"emb": "emb/embedding", **{name: f"{name}/kernel" for name in [*EVERY[1:], "head"]}}


def on(names, adapter):
    return {RULES[name]: adapter for name in names}


def adapted(params, rules, options):
    views = lrx.Views(
        rules=tuple((path, view) for path, view in CONVOLUTIONS.items() if path in rules)
    )
    adapt = jax.jit(
        lambda params: lrx.adapt(params, rules, jax.random.key(0), views=views, **options), **FAST
    )
    return randomised(adapt(params))
