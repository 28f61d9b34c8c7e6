"""A vision transformer in Flax linen, for fine-tuning experiments on images.

ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): square patches, a class token, learned positions,
pre-norm blocks of attention and a GELU network, the head on the normed class token. One block:

    x = x + o_proj(softmax(q k^T / sqrt(K)) v),   q, k, v = {q,k,v}_proj(norm(x))
    x = x + down_proj(gelu(up_proj(norm(x))))

Shapes are named by their suffix:

    B batch   I image side   C channels   P patch side   N = (I / P)² patches   S = N + 1 sequence   D width
    F hidden (feed-forward)   H heads   K = D / H   L layers   Y classes

Patches are embedded by a `nn.Conv` of stride P, every other product is a `nn.Dense`; all have
biases: `patch_embed/kernel (P, P, C, D)`, `class_token (1, D)`, `positions (S, D)`,
`layers/attention/{q,k,v,o}_proj/kernel`, `layers/attention_norm/{scale,bias}`,
`layers/mlp/{up,down}_proj/kernel`, `layers/mlp_norm/{scale,bias}`, `norm/{scale,bias}`,
`head/kernel (D, Y)`. Leaves under `layers` have a leading axis L when the layers are scanned;
unscanned layers are named `layer_0`, `layer_1`, ... as in `experiments.models.llama`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp

from experiments.models.attention import attention
from experiments.models.divided import promoted, rematerialised, summed
from experiments.models.llama import DTYPES, REMAT_POLICIES
from lowrank_jax import dot_general, sharding
from lowrank_jax.sharding.meshes import constrain

NORM_EPS = 1e-6  # of the official code


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Shape and precision of a model.

    Attributes:
      image, patch, channels: side of the square images, I; side of a patch, P, which divides it; C.
      width, hidden, heads, layers: D, F, H, which divides D, and L.
      classes: outputs of the head, Y.
      dtype, param_dtype: of the matrix products and of the parameters, "float32" or "bfloat16".
        Statistics of norms, softmax and logits are float32 in either case.
      remat: False, True (keep only the input of each block), or the name of a
        `jax.checkpoint_policies` member.
      scan: compile one block and scan it over stacked parameters.
    """

    image: int
    patch: int
    channels: int
    width: int
    hidden: int
    heads: int
    layers: int
    classes: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool | str = False
    scan: bool = True

    def __post_init__(self):
        for name in ("image", "patch", "channels", "width", "hidden", "heads", "layers", "classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give a positive integer")
        if self.image % self.patch:
            raise ValueError(
                f"patch={self.patch} does not divide image={self.image}: choose a divisor of the "
                "side"
            )
        if self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}: choose a divisor of the "
                "width"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(DTYPES)}"
                )
        if not isinstance(self.remat, bool) and self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat={self.remat!r}: choose False, True, or one of {', '.join(REMAT_POLICIES)}"
            )

    @property
    def patches(self) -> int:
        """Patches of an image, N."""
        return (self.image // self.patch) ** 2


def _shape(width, hidden, heads, layers):
    return VitConfig(
        image=224,
        patch=16,
        channels=3,
        width=width,
        hidden=hidden,
        heads=heads,
        layers=layers,
        classes=1000,
    )


# S/16: Touvron et al. 2021 (arXiv:2012.12877); B/16 and L/16: Dosovitskiy et al., table 1. digits
# is for 8 x 8 images.
PRESETS = {
    "digits": VitConfig(
        image=8, patch=2, channels=1, width=64, hidden=128, heads=4, layers=4, classes=10
    ),
    "S/16": _shape(384, 1536, 6, 12),
    "B/16": _shape(768, 3072, 12, 12),
    "L/16": _shape(1024, 4096, 16, 24),
}


def preset(name: str, **overrides) -> VitConfig:
    """The preset `name` with fields replaced.

    >>> preset("B/16", classes=10).width
    768
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(VitConfig)]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"unknown model field {key!r}: choose among {', '.join(fields)}")
    return dataclasses.replace(PRESETS[name], **overrides)


def parameter_count(config: VitConfig) -> int:
    """L (4 D² + 2 D F + 9 D + F) + P² C D + D + (N + 2) D + 2 D + (D + 1) Y.

    A block has four D x D products, two D x F ones, their biases (5 D + F) and two norms (4 D);
    before and after the blocks stand the patches with their bias, class token and positions, a
    norm, and the head.

    >>> f"{parameter_count(preset('B/16')):,}"  # as torchvision counts its vit_b_16
    '86,567,656'
    """
    D, F = config.width, config.hidden
    blocks = config.layers * (4 * D**2 + 2 * D * F + 9 * D + F)
    ends = (
        config.patch**2 * config.channels * D
        + D
        + (config.patches + 2) * D
        + 2 * D
        + (D + 1) * config.classes
    )
    return blocks + ends


def flops_per_image(config: VitConfig) -> int:
    """Operations of one forward and backward pass, per image, as `llama.flops_per_token`.

    6 (S L (4 D² + 2 D F) + N P² C D + D Y) + 12 L D S².

    >>> flops_per_image(preset("digits"))
    14285568
    """
    D, S = config.width, config.patches + 1
    blocks = S * config.layers * (4 * D**2 + 2 * D * config.hidden)
    ends = config.patches * config.patch**2 * config.channels * D + D * config.classes
    return 6 * (blocks + ends) + 12 * config.layers * D * S**2


def _dense(config, features, name, **kwargs):
    dtypes = {"dtype": DTYPES[config.dtype], "param_dtype": DTYPES[config.param_dtype]}
    kwargs = {"dot_general": dot_general} | kwargs
    kwargs |= {"kernel_init": nn.initializers.xavier_uniform(), "promote_dtype": promoted}
    return nn.Dense(features, **dtypes, name=name, **kwargs)


def _norm(config, name):
    return nn.LayerNorm(
        epsilon=NORM_EPS,
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        name=name,
    )


class Attention(nn.Module):
    """Every position reads every position."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxSxD):
        """Of normed x, without the residual connection."""
        config = self.config
        B, S, D = x_BxSxD.shape
        heads = (B, S, config.heads, D // config.heads)
        q_BxSxHxK, k_BxSxHxK, v_BxSxHxK = (
            sharding.reshape(_dense(config, D, f"{name}_proj")(x_BxSxD), heads, first=2)
            for name in ("q", "k", "v")
        )
        q_BxSxHxK = constrain(q_BxSxHxK, "batch", "length", "heads", None)
        k_BxSxHxK, v_BxSxHxK = (
            constrain(x, "batch", None, "heads", None) for x in (k_BxSxHxK, v_BxSxHxK)
        )
        # scores and softmax are float32 inside
        out_BxSxHxK = attention(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, causal=False)
        out_BxSxD = out_BxSxHxK.reshape(B, S, D)
        return _dense(config, D, "o_proj", dot_general=summed(out_BxSxD, D))(out_BxSxD)


class MLP(nn.Module):
    """down(gelu(up(x))) with the exact, erf form of gelu."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxSxD):
        """Of normed x, without the residual connection."""
        D = self.config.width
        h_BxSxF = nn.gelu(
            _dense(self.config, self.config.hidden, "up_proj")(x_BxSxD), approximate=False
        )
        h_BxSxF = constrain(h_BxSxF, "batch", "length", "mlp")
        return _dense(self.config, D, "down_proj", dot_general=summed(h_BxSxF, D))(h_BxSxF)


class Block(nn.Module):
    """One layer, in the (carry, per-layer output) form that `nn.scan` wants."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxSxD, _=None):
        """Of (x, nothing to scan over), giving (x, nothing to stack)."""
        config = self.config
        x_BxSxD = constrain(x_BxSxD, "batch", "length", None)
        x_BxSxD = x_BxSxD + Attention(config, name="attention")(
            _norm(config, "attention_norm")(x_BxSxD)
        )
        x_BxSxD = constrain(x_BxSxD, "batch", "length", None)
        x_BxSxD = x_BxSxD + MLP(config, name="mlp")(_norm(config, "mlp_norm")(x_BxSxD))
        return constrain(x_BxSxD, "batch", "length", None), None


class Vit(nn.Module):
    """Images (B, I, I, C) to logits (B, Y) float32.

    Raises ValueError when the images have another shape than the configuration says.

    >>> import jax
    >>> model = Vit(preset("digits", layers=1))
    >>> images = jnp.zeros((2, 8, 8, 1))
    >>> variables = jax.eval_shape(
    ...     model.init, jax.random.key(0), images
    ... )  # shapes of {"params": ...}
    >>> jax.eval_shape(model.apply, variables, images).shape
    (2, 10)
    """

    config: VitConfig

    @nn.compact
    def __call__(self, images_BxIxIxC):
        """Logits of images."""
        config = self.config
        expected = (config.image, config.image, config.channels)
        if images_BxIxIxC.shape[1:] != expected:
            raise ValueError(
                f"images of shape {images_BxIxIxC.shape[1:]}: the model takes {expected}"
            )
        dtype, param_dtype = DTYPES[config.dtype], DTYPES[config.param_dtype]
        patches = nn.Conv(
            config.width,
            (config.patch, config.patch),
            strides=config.patch,
            padding="VALID",
            dtype=dtype,
            param_dtype=param_dtype,
            promote_dtype=promoted,
            name="patch_embed",
        )(images_BxIxIxC)
        B, D = len(images_BxIxIxC), config.width
        class_token = self.param("class_token", nn.initializers.zeros, (1, D), param_dtype)
        positions_SxD = self.param(
            "positions", nn.initializers.normal(0.02), (config.patches + 1, D), param_dtype
        )
        first = constrain(
            jnp.broadcast_to(class_token.astype(dtype), (B, 1, D)), "batch", None, None
        )
        x_BxSxD = jnp.concatenate(
            [first, patches.reshape(B, -1, D)], axis=1
        ) + positions_SxD.astype(dtype)
        x_BxSxD = constrain(x_BxSxD, "batch", "length", None)
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
        x_BxD = constrain(_norm(config, "norm")(x_BxSxD), "batch", None, None)[:, 0]
        product = functools.partial(dot_general, preferred_element_type=jnp.float32)
        logits = _dense(config, config.classes, "head", dot_general=product)(x_BxD)
        return logits.astype(jnp.float32)
