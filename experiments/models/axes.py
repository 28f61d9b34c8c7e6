"""Names of the axes of our models' parameters, for `lrx.meshes`."""

LLAMA = (
    (r"embed/embedding", ("vocabulary", "embed")),
    (r"lm_head/kernel", ("embed", "vocabulary")),
    (r"classifier/kernel", (None, None)),
    (r".*/attention/q_proj/kernel", ("embed", "heads")),
    (r".*/attention/[kv]_proj/kernel", ("embed", "kv")),
    (r".*/attention/o_proj/kernel", ("heads", "embed")),
    (r".*/mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
    (r".*/mlp/down_proj/kernel", ("mlp", "embed")),
    (r".*/attention/q_proj/bias", ("heads",)),
    (r".*/attention/[kv]_proj/bias", ("kv",)),
    (r".*/mlp/(gate|up)_proj/bias", ("mlp",)),
    (r".*/(o|down)_proj/bias", ("norm",)),
    (r"(.*/)?[a-z_]*norm/scale", ("norm",)),
)

VIT = (
    (r"patch_embed/kernel", (None, None, None, "embed")),
    (r"patch_embed/bias", ("norm",)),
    (r"class_token|positions", (None, "norm")),
    (r"head/kernel", ("embed", None)),
    (r"head/bias", (None,)),
    (r".*/attention/[qkv]_proj/kernel", ("embed", "heads")),
    (r".*/attention/[qkv]_proj/bias", ("heads",)),
    (r".*/attention/o_proj/kernel", ("heads", "embed")),
    (r".*/mlp/up_proj/kernel", ("embed", "mlp")),
    (r".*/mlp/up_proj/bias", ("mlp",)),
    (r".*/mlp/down_proj/kernel", ("mlp", "embed")),
    (r".*/(o|down)_proj/bias", ("norm",)),
    (r"(.*/)?[a-z_]*norm/(scale|bias)", ("norm",)),
)
