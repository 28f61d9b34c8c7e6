"""A LLaMA-style decoder in Flax linen, the model every pre-training experiment uses.

Pre-norm blocks of grouped-query attention and SwiGLU (Touvron et al. 2023, arXiv:2302.13971),
RMSNorm, rotary positions in Hugging Face's half-split convention, biases only where `biases` names
them. One block:

    x = x + o_proj(softmax(rope(q) rope(k)^T / sqrt(K), causal) v),   q, k, v = {q,k,v}_proj(norm(x))
    x = x + down_proj(silu(gate_proj(h)) * up_proj(h)),               h = norm(x)

Shapes are named by their suffix:

    B batch   S sequence   D width   F hidden (feed-forward)   H query heads   G key/value heads
    K head size (D / H unless `head_dim` says else)   V vocabulary   L layers

Every linear layer is a `nn.Dense` whose kernel is `(d_in, d_out)`, or `(L, d_in, d_out)` when the
layers are scanned: `embed/embedding`, `layers/attention/{q,k,v,o}_proj/kernel`,
`layers/attention_norm/scale`, `layers/mlp/{gate,up,down}_proj/kernel`, `layers/mlp_norm/scale`,
`norm/scale`, `lm_head/kernel`. Unscanned layers are named `layer_0`, `layer_1`, ... in place of
`layers`. A bias is `bias` beside its `kernel`.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.attention import attention, chunked_attention
from experiments.models.divided import (
    Embed,
    beside,
    chosen,
    positions,
    promoted,
    rematerialised,
    summed,
)
from experiments.settings.sections import check, choice, number
from lowrank_jax import dot_general, sharding
from lowrank_jax.sharding.meshes import at_input, constrain

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SCALINGS: dict[object, int] = {"linear": 1, "llama3": 4}  # kinds, and how many numbers each takes
REMAT_POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and precision of a model.

    Attributes:
      vocabulary_size: number of token ids, V.
      width: residual stream, D.
      hidden: inner width of the SwiGLU layer, F.
      heads, kv_heads: query heads H and key/value heads G; G divides H, H divides D unless
        `head_dim` is set.
      layers: number of blocks, L.
      sequence_length: longest sequence the model accepts.
      rope_theta: base of the rotary frequencies (10000: Su et al. 2021, arXiv:2104.09864).
      norm_eps: added to the mean square (1e-6: LLaMA).
      tied_head: use the embedding transposed as the output layer.
      dtype, param_dtype: of the matrix products and of the parameters, "float32" or "bfloat16".
        Norms, rotations, softmax and logits are float32 in either case.
      remat: False, True (keep only the input of each block), or the name of a
        `jax.checkpoint_policies` member.
      scan: compile one block and scan it over stacked parameters.
      init_std: standard deviation of the normal initialiser of all matrices (0.02: LLaMA, GaLore).
      attention_chunk: positions that attention takes at once, so that no S x S scores are kept
        (`models.attention`); None makes all scores of a sequence.
      head_dim: size of a head, K; None is D / H.
      rope_scaling: stretches the rotary frequencies (`rope_frequencies`): None, ("linear", factor),
        or ("llama3", factor, low, high, length) as in LLaMA 3.1.
      biases: which of PROJECTIONS add a bias, as Qwen2's q_proj, k_proj and v_proj do; None is
        none.
    """

    vocabulary_size: int = number(at_least=1)
    width: int = number(at_least=1)
    hidden: int = number(at_least=1)
    heads: int = number(at_least=1)
    kv_heads: int = number(at_least=1)
    layers: int = number(at_least=1)
    sequence_length: int = number(at_least=1)
    rope_theta: float = number(10000.0, above=0)
    norm_eps: float = number(1e-6, above=0)
    tied_head: bool = False
    dtype: str = choice("float32", DTYPES)
    param_dtype: str = choice("float32", DTYPES)
    remat: bool | str = False
    scan: bool = True
    init_std: float = number(0.02, above=0)
    attention_chunk: int | None = number(None, at_least=1)
    head_dim: int | None = number(None, at_least=1)
    rope_scaling: tuple[str | float, ...] | None = None
    biases: tuple[str, ...] | None = None

    def __post_init__(self):
        check(type(self), "", vars(self))
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}: choose a divisor of the "
                "width"
            )
        if self.head_size % 2:
            name = "width / heads = " if self.head_dim is None else "head_dim="
            raise ValueError(
                f"{name}{self.head_size} is odd: rotary positions need an even head size"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: choose a divisor of "
                "heads"
            )
        if not isinstance(self.remat, bool) and self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat={self.remat!r}: choose False, True, or one of {', '.join(REMAT_POLICIES)}"
            )
        for name in self.biases or ():
            if name not in PROJECTIONS:
                raise ValueError(f"biases={self.biases!r}: choose among {', '.join(PROJECTIONS)}")
        self._check_rope_scaling()

    def _check_rope_scaling(self):
        if self.rope_scaling is None:
            return
        kind, *numbers = self.rope_scaling or (None,)
        positive = [number for number in numbers if isinstance(number, int | float) and number > 0]
        complete = len(positive) == len(numbers) == _SCALINGS.get(kind)
        if not complete or (kind == "llama3" and positive[1] >= positive[2]):
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r}: give None, ('linear', factor) or ('llama3', "
                "factor, low, high, length) with positive numbers and low < high"
            )

    @property
    def head_size(self) -> int:
        """K."""
        return self.head_dim or self.width // self.heads


def _shape(width, hidden, heads, layers, vocabulary_size=32000):
    return LlamaConfig(
        vocabulary_size=vocabulary_size,
        width=width,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        layers=layers,
        sequence_length=256,
    )


# GaLore's configs (github.com/jiaweizzhao/GaLore, configs/llama_*.json), trained at 256 tokens;
# vocabulary 32000. nano is the 9M shape with the byte tokenizer's vocabulary: 0.86 M parameters.
PRESETS = {
    "nano": _shape(128, 352, 4, 4, vocabulary_size=259),
    "9M": _shape(128, 352, 4, 4),
    "20M": _shape(256, 688, 4, 4),
    "35M": _shape(384, 1024, 8, 6),
    "60M": _shape(512, 1376, 8, 8),
    "130M": _shape(768, 2048, 12, 12),
    "350M": _shape(1024, 2736, 16, 24),
    "1B": _shape(2048, 5461, 32, 24),
    "3B": _shape(2560, 6848, 32, 32),
    "7B": _shape(4096, 11008, 32, 32),
}


def preset(name: str, **overrides) -> LlamaConfig:
    """The preset `name` with fields replaced.

    >>> preset("60M", sequence_length=128).width
    512
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"unknown model field {key!r}: choose among {', '.join(fields)}")
    return dataclasses.replace(PRESETS[name], **overrides)


def layer_matrix_parameters(config: LlamaConfig) -> int:
    """Parameters of one block's matrices: 2 D H K + 2 D G K + 3 D F."""
    return config.width * (
        2 * (config.heads + config.kv_heads) * config.head_size + 3 * config.hidden
    )


def layer_bias_parameters(config: LlamaConfig) -> int:
    """Parameters of one block's biases: the widths of what the projections in `biases` give."""
    K = config.head_size
    attention, mlp = (
        [config.heads * K, config.kv_heads * K, config.kv_heads * K, config.width],
        [config.hidden] * 2,
    )
    widths = [*attention, *mlp, config.width]
    return sum(
        width
        for name, width in zip(PROJECTIONS, widths, strict=True)
        if name in (config.biases or ())
    )


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters: L (2 D H K + 2 D G K + 3 D F + 2 D) + D + V D + biases.

    2 V D in place of V D when the head is not tied.

    >>> f"{parameter_count(preset('60M')) / 1e6:.2f} M"
    '58.07 M'
    """
    norms = 2 * config.width
    layer = layer_matrix_parameters(config) + layer_bias_parameters(config) + norms
    tables = config.vocabulary_size * config.width * (1 if config.tied_head else 2)
    return config.layers * layer + config.width + tables


def flops_per_token(config: LlamaConfig, sequence_length: int | None = None) -> int:
    """Operations of one forward and backward pass, per token of a sequence of length S.

    6 (L (2 D H K + 2 D G K + 3 D F) + V D) + 12 L H K S: six per weight that meets the token in a
    matrix product (the head, tied or not, but not the embedding look-up) and, as in PaLM
    (arXiv:2204.02311, appendix B), the two S x S attention products counted whole, without the
    saving of the causal mask. Rematerialisation is not counted.

    >>> flops_per_token(preset("nano"))
    6588672
    """
    sequence_length = sequence_length or config.sequence_length
    head = config.vocabulary_size * config.width
    weights = config.layers * layer_matrix_parameters(config) + head
    return 6 * weights + 12 * config.layers * config.heads * config.head_size * sequence_length


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x²) + eps), in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        """Of x (..., D) in any dtype; the result is in the compute dtype."""
        scale = self.param(
            "scale", nn.initializers.ones, (x.shape[-1],), DTYPES[self.config.param_dtype]
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * scale).astype(DTYPES[self.config.dtype])


def rope_frequencies(K, theta, scaling=None):
    """The angles of the K / 2 pairs per position: f_i = theta^(-2 i / K), float32, stretched.

    ("linear", factor): f / factor (Chen et al. 2023, arXiv:2306.15595).
    ("llama3", factor, low, high, length): f / factor where a pair turns less than `low` times in
    `length` positions, f where it turns more than `high` times, and between them, as LLaMA 3.1's
    code has it,

        f ((1 - s) / factor + s),   s = (f length / (2 pi) - low) / (high - low)

    >>> rope_frequencies(4, 100.0, ("linear", 2.0))
    Array([0.5 , 0.05], dtype=float32)
    """
    frequencies = theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    if scaling is None:
        return frequencies
    kind, factor, *rest = scaling
    if kind == "linear":
        return frequencies / factor
    low, high, length = rest
    # turns in `length` positions, between the two bounds as 0 to 1
    share = jnp.clip((frequencies * (length / (2 * math.pi)) - low) / (high - low), 0, 1)
    return frequencies * ((1 - share) / factor + share)


def rotate(x_BxSxHxK, theta, scaling=None):
    """Rotary positions, half-split: the pair (x_i, x_{i + K/2}) turns by position * f_i.

    f is `rope_frequencies(K, ...)`.

    >>> float(rotate(jnp.ones((1, 2, 1, 2)), 1e4)[0, 1, 0, 0])  # cos 1 - sin 1
    -0.30116...
    """
    S, K = x_BxSxHxK.shape[1], x_BxSxHxK.shape[3]
    frequencies = rope_frequencies(K, theta, scaling)
    angles = jnp.arange(S, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxSxHxK.dtype)


def _dense(config, features, name, **kwargs):
    kwargs = {"dot_general": dot_general} | kwargs
    return nn.Dense(
        features,
        use_bias=name in (config.biases or ()),
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        kernel_init=nn.initializers.normal(config.init_std),
        promote_dtype=promoted,
        name=name,
        **kwargs,
    )


class Attention(nn.Module):
    """Causal grouped-query attention; query head h reads key/value head h // (H / G)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxSxD):
        """Of normed x, without the residual connection."""
        config = self.config
        K = config.head_size
        B, S, _ = x_BxSxD.shape
        q_BxSxHxK, k_BxSxGxK, v_BxSxGxK = (
            sharding.reshape(
                _dense(config, heads * K, f"{name}_proj")(x_BxSxD), (B, S, heads, K), first=2
            )
            for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        # over a divided sequence every position reads the keys and values of all
        q_BxSxHxK = constrain(q_BxSxHxK, "batch", positions(config.attention_chunk), "heads", None)
        k_BxSxGxK, v_BxSxGxK = (
            constrain(x, "batch", None, "kv", None) for x in (k_BxSxGxK, v_BxSxGxK)
        )
        # where the mesh divides the query heads alone, each of them has its own copy
        k_BxSxGxK, v_BxSxGxK = (beside(x, q_BxSxHxK) for x in (k_BxSxGxK, v_BxSxGxK))
        q_BxSxHxK, k_BxSxGxK = (
            rotate(x, config.rope_theta, config.rope_scaling) for x in (q_BxSxHxK, k_BxSxGxK)
        )
        # scores and softmax are float32 inside
        product = functools.partial(attention, causal=True)
        if config.attention_chunk is not None:
            product = functools.partial(chunked_attention, chunk=config.attention_chunk)
        out_BxSxHxK = product(q_BxSxHxK, k_BxSxGxK, v_BxSxGxK)
        out_BxSxF = out_BxSxHxK.reshape(B, S, config.heads * K)
        return _dense(config, config.width, "o_proj", dot_general=summed(out_BxSxF, config.width))(
            out_BxSxF
        )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxSxD):
        """Of normed x, without the residual connection."""
        config = self.config
        gate_BxSxF, up_BxSxF = (
            _dense(config, config.hidden, name)(x_BxSxD) for name in ("gate_proj", "up_proj")
        )
        h_BxSxF = constrain(nn.silu(gate_BxSxF) * up_BxSxF, "batch", "length", "mlp")
        return _dense(config, config.width, "down_proj", dot_general=summed(h_BxSxF, config.width))(
            h_BxSxF
        )


class Block(nn.Module):
    """One layer, in the (carry, per-layer output) form that `nn.scan` wants."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxSxD, _=None):
        """Of (x, nothing to scan over), giving (x, nothing to stack)."""
        x_BxSxD = constrain(x_BxSxD, "batch", "length", None)
        x_BxSxD = x_BxSxD + Attention(self.config, name="attention")(
            RMSNorm(self.config, name="attention_norm")(x_BxSxD)
        )
        x_BxSxD = constrain(x_BxSxD, "batch", "length", None)
        x_BxSxD = x_BxSxD + MLP(self.config, name="mlp")(
            RMSNorm(self.config, name="mlp_norm")(x_BxSxD)
        )
        return constrain(x_BxSxD, "batch", "length", None), None


class Llama(nn.Module):
    """Tokens (B, S) int32 to logits (B, S, V) float32.

    Raises ValueError when S exceeds `config.sequence_length`.

    >>> model = Llama(preset("nano", layers=1))
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> variables = jax.eval_shape(
    ...     model.init, jax.random.key(0), tokens
    ... )  # shapes of {"params": ...}
    >>> jax.eval_shape(model.apply, variables, tokens).shape
    (2, 8, 259)
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens_BxS):
        """Logits of token ids."""
        config = self.config
        if tokens_BxS.shape[1] > config.sequence_length:
            limit = f"sequence_length={config.sequence_length}"
            raise ValueError(
                f"{tokens_BxS.shape[1]} tokens exceed {limit}: shorten them, or raise it"
            )
        embed = Embed(
            config.vocabulary_size,
            config.width,
            dtype=DTYPES[config.dtype],
            param_dtype=DTYPES[config.param_dtype],
            embedding_init=nn.initializers.normal(config.init_std),
            name="embed",
        )
        x_BxSxD = embed(tokens_BxS)
        block = rematerialised(Block, config)
        if config.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=config.layers,
            )
            x_BxSxD, _ = stack(config, name="layers")(x_BxSxD, None)
        else:
            for layer in range(config.layers):
                x_BxSxD, _ = block(config, name=f"layer_{layer}")(x_BxSxD)
        x_BxSxD = RMSNorm(config, name="norm")(x_BxSxD)
        # logits in float32, whatever the compute dtype
        product = functools.partial(dot_general, preferred_element_type=jnp.float32)
        if config.tied_head:
            table_VxD = embed.embedding.astype(DTYPES[config.dtype])
            kernel_VxD = at_input(table_VxD, x_BxSxD, rows=-1)
            logits_BxSxV = product(x_BxSxD, kernel_VxD, (((2,), (1,)), ((), ())))
        else:
            logits_BxSxV = _dense(config, config.vocabulary_size, "lm_head", dot_general=product)(
                x_BxSxD
            )
        return constrain(logits_BxSxV, "batch", "length", "vocabulary")


def token_losses(logits_BxSxV, targets_BxS):
    """Cross-entropy in nats per token, logsumexp(logits) - logits[target], float32, (B, S)."""
    logits_BxSxV = logits_BxSxV.astype(jnp.float32)
    chosen_BxS = chosen(logits_BxSxV, targets_BxS)
    return jax.nn.logsumexp(logits_BxSxV, axis=-1) - chosen_BxS


def loss_and_metrics(logits_BxSxV, targets_BxS, weights_BxS):
    """The exact token mean sum(w * loss) / sum(w), and both sums for averaging over batches.

    A batch without weight has loss 0.

    >>> loss, parts = loss_and_metrics(
    ...     jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), jnp.int32), jnp.array([[1.0, 0.0]])
    ... )
    >>> round(float(loss), 4), float(parts["weight_sum"])  # log 4
    (1.3863, 1.0)
    """
    weights_BxS = weights_BxS.astype(jnp.float32)
    loss_sum = jnp.sum(token_losses(logits_BxSxV, targets_BxS) * weights_BxS)
    weight_sum = jnp.sum(weights_BxS)
    return loss_sum / jnp.maximum(weight_sum, 1.0), {"loss_sum": loss_sum, "weight_sum": weight_sum}
