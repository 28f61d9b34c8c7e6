"""Models that others wrote, tiny and random, as functions of a tree of parameters.

Each says by hand what its kernels are: the matrix view of every leaf that a product uses.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax import MatrixView, Views
from lowrank_jax.trees import path_of

MATRIX = MatrixView(rows=(0,), cols=(1,))
HEADS = MatrixView(rows=(0,), cols=(1, 2))  # (features, heads, head size)
STACK = MatrixView(batch=(0,), rows=(1,), cols=(2,))
FROM_HEADS = MatrixView(rows=(0, 1), cols=(2,))
KV = MatrixView(batch=(0,), rows=(2,), cols=(1, 3))  # (k or v, heads, features, head size)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model of another package.

    Attributes:
      loss: of parameters and a batch; `params` and `batch` are such.
      logits: what the loss is of, of the same two.
      views: the view of every leaf that is a matrix, by pattern of its path; the first that matches
        counts, and a leaf that none matches is no matrix.
      fused: of these, what a program cannot tell: it multiplies by k and v at once, and has one
        matrix where we mean two.
      tolerance: of gradients in float32, relative to the largest.
      left_out: of these, what adapters and optimizers leave out, as the papers do.
      hugging_face: the name of a leaf's weight in the model of Hugging Face, None without one.
    """

    logits: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any
    views: dict[str, MatrixView]
    fused: dict[str, MatrixView] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-4
    left_out: str = "embedder/.*|lm_head/.*|.*/router/.*"
    hugging_face: Callable[[str, int | None], str] | None = None

    def rules(self, everything: bool = False) -> Views:
        """Those of what is adapted, or of `everything`; other leaves are no matrices."""
        found: list[tuple[str, MatrixView | None]] = []
        for path, view in self.table(self.views).items():
            left_out = not everything and re.fullmatch(self.left_out, path)
            found.append((re.escape(path), None if left_out else view))
        return Views(rules=tuple(found))

    def table(self, views: dict[str, MatrixView]) -> dict[str, MatrixView | None]:
        """The view of every leaf; None where it is no matrix."""
        keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(self.params)[0]]
        paths = map(path_of, keys)
        return {
            path: next((view for p, view in views.items() if re.fullmatch(p, path)), None)
            for path in paths
        }

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Cross-entropy of the logits."""
        return cross_entropy(self.logits(params, batch), batch)


def as_one(view: MatrixView) -> MatrixView:
    """Matrices that one product multiplies by, side by side."""
    return MatrixView(rows=view.rows, cols=tuple(sorted((*view.batch, *view.cols))))


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """Of the next token where the batch is tokens, else of labels that count up."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if batch.dtype == jnp.int32:
        chosen = jnp.take_along_axis(log_p[:, :-1], batch[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)
    labels = jnp.arange(len(batch)) % logits.shape[-1]
    return -jnp.mean(log_p[jnp.arange(len(batch)), labels])


# --------------------------------------------------------------------------- tunix

SIZES = {
    "num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8,
    "num_kv_heads": 2,
}  # fmt: skip


def tunix(module: str, make: str, **options: Any) -> Foreign:
    """Of `tunix.models`, split into its graph and its parameters."""
    library = __import__(f"tunix.models.{module}.model", fromlist=["model"])
    config = library.ModelConfig(**SIZES | options)
    model = getattr(library, make)(config, rngs=nnx.Rngs(0))
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    # experts and Gemma's stacked k and v are parameters there, not modules
    name = None if module == "gemma3" or "num_experts" in options else torch_name
    batch, length = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))

    def logits(params, tokens):
        return nnx.merge(graph, params, *rest)(tokens, positions, None, causal)[0]

    fused = {".*/kv_einsum/w": as_one(KV)}
    return Foreign(logits, nnx.to_pure_dict(params), TOKENS, TUNIX, fused, hugging_face=name)


def torch_name(path: str, index: int | None) -> str:
    """Hugging Face's name of a weight of tunix's Qwen and Llama."""
    del index
    block = path.replace("/attn/", "/self_attn/").removesuffix("/kernel").removesuffix("/w")
    return "model." + block.replace("/", ".") + ".weight"


TUNIX = {
    r".*/[qkv]_proj/w": HEADS,
    r".*/o_proj/w|.*/attn_vec_einsum/w": FROM_HEADS,
    r".*/(gate|up|down)_proj/kernel": MATRIX,
    r".*/(gate|up|down)_proj": STACK,  # experts
    r".*/router/kernel": MATRIX,
    r".*/q_einsum/w": MatrixView(rows=(1,), cols=(0, 2)),  # (heads, features, head size)
    r".*/kv_einsum/w": KV,
    r"embedder/input_embedding": MATRIX,
    r"lm_head/w": MATRIX,
}

# --------------------------------------------------------------------------- gemma


def gemma(**options: Any) -> Foreign:
    """Two blocks of gemma's linen transformer, between its embedder and its norm."""
    from flax import linen as nn
    from gemma.gm.nn import _layers, _modules

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            batch, length = tokens.shape
            positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
            causal = jnp.tril(jnp.ones((length, length), bool))
            mask = jnp.broadcast_to(causal, (batch, length, length))
            embedder = _modules.Embedder(vocab_size=32, embed_dim=16, name="embedder")
            x = embedder.encode(tokens)
            for number, kind in enumerate(("GLOBAL", "LOCAL_SLIDING")):
                block = _modules.Block(
                    num_heads=4, embed_dim=16, head_dim=8, hidden_dim=24,
                    use_post_attn_norm=True, use_post_ffw_norm=True, query_pre_attn_scalar=8**-0.5,
                    attn_type=_modules.AttentionType[kind], sliding_window_size=4,
                    name=f"layer_{number}", **options,
                )  # fmt: skip
                _, x = block(x, positions, None, mask)
            return embedder.decode(_layers.RMSNorm(name="final_norm")(x))

    model = Model()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    swapped = options["transpose_gating_einsum"]
    gating = MatrixView(batch=(0,), rows=(2,), cols=(1,)) if swapped else STACK

    def logits(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, tokens)

    views = GEMMA | {r".*/mlp/gating_einsum": gating}
    fused = {path: as_one(view) for path, view in views.items() if view.batch}
    return Foreign(logits, params, TOKENS, views, fused)


GEMMA = {
    r".*/attn/qkv_einsum/w": KV,
    r".*/attn/q_einsum/w": MatrixView(rows=(1,), cols=(0, 2)),
    r".*/attn/kv_einsum/w": KV,
    r".*/attn/attn_vec_einsum/w": FROM_HEADS,
    r".*/mlp/linear": MATRIX,
    r"embedder/input_embedding": MATRIX,
}


# ------------------------------------------------------------- equinox, haiku, flaxmodels


def equinox() -> Foreign:
    """A multilayer perceptron under vmap, whose weights are (outputs, inputs)."""
    import equinox as eqx

    model = eqx.nn.MLP(in_size=6, out_size=5, width_size=16, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    views = {r"layers/\d/weight": MatrixView(rows=(1,), cols=(0,))}
    return Foreign(logits, params, jax.random.normal(jax.random.key(1), (8, 6)), views)


def haiku() -> Foreign:
    """Haiku's Transformer parts: its attention and perceptron over an embedding."""
    import haiku as hk

    def forward(tokens):
        x = hk.Embed(vocab_size=32, embed_dim=16, name="embed")(tokens)
        causal = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))
        init = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(num_heads=2, key_size=8, w_init=init, name="attention")
        x = x + attention(x, x, x, mask=causal)
        x = x + hk.nets.MLP([24, 16], name="mlp")(x)
        return hk.Linear(32, name="head")(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), TOKENS)
    views = {r"embed/embeddings": MATRIX, r".*/w": MATRIX}
    return Foreign(model.apply, params, TOKENS, views, left_out="embed/.*|head/.*")


def flaxmodels() -> Foreign:
    """A residual network of convolutions, with the statistics of its norms held."""
    import flaxmodels as fm

    model = fm.ResNet18(output="logits", pretrained=None, num_classes=4, normalize=False)
    pictures = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    variables = model.init(jax.random.key(0), pictures, train=False)
    params = variables["params"]
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def logits(params, pictures):
        return model.apply({"params": params, **rest}, pictures, train=False)

    views = {
        r".*Conv_\d/kernel": MatrixView(rows=(0, 1, 2), cols=(3,)),
        r"Dense_0/kernel": MATRIX,
    }
    left_out = "BasicBlock_[2-7].*|Dense_0.*"
    # units at the kink of a ReLU take either side in float32: 9e-3 there, 3e-15 in float64
    return Foreign(logits, params, pictures, views, tolerance=2e-2, left_out=left_out)


QWEN = {"vocab_size": 32, "rope_theta": 10_000, "norm_eps": 1e-6}
MODELS: dict[str, Callable[[], Foreign]] = {
    "tunix_qwen3": functools.partial(tunix, "qwen3", "Qwen3", **QWEN),
    "tunix_qwen3_tied": functools.partial(
        tunix, "qwen3", "Qwen3", **QWEN, use_tied_embedding=True, remat_config=2
    ),
    "tunix_qwen3_moe": functools.partial(
        tunix, "qwen3", "Qwen3", **QWEN, num_experts=3, num_experts_per_tok=2
    ),
    "tunix_qwen2": functools.partial(tunix, "qwen2", "Qwen2", **QWEN),
    "tunix_llama3": functools.partial(tunix, "llama3", "Llama3", **QWEN),
    "tunix_gemma3": functools.partial(
        tunix, "gemma3", "Gemma3", num_embed=32, sliding_window_size=4, param_dtype=jnp.float32
    ),
    "gemma_fused": functools.partial(gemma, num_kv_heads=4, transpose_gating_einsum=True),
    "gemma": functools.partial(gemma, num_kv_heads=2, transpose_gating_einsum=False),
    "equinox": equinox,
    "haiku": haiku,
    "flaxmodels": flaxmodels,
}
