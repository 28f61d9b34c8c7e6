"""Which leaves are adapted, at which rank, what trains in full, what the report says, and what every
error says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_jax as lrx

A = lrx.adapters
KEY = jax.random.key(0)
LORA = A.lora(rank=2)


def block(m=6):
    return {name: {"kernel": jnp.ones((8, m)), "bias": jnp.zeros(m)} for name in ("q", "v")}


def params():
    return {
        "embed": {"embedding": jnp.ones((9, 8))},
        "layers_0": block(),
        "layers_1": block(),
        "layers_10": block(),
        "norm": {"scale": jnp.ones(8)},
        "head": {"kernel": jnp.ones((8, 9)), "bias": jnp.zeros(9)},
    }


def stack():
    return {
        "layers": {
            "q": {"kernel": jnp.ones((3, 8, 6))},
            "experts": {"kernel": jnp.ones((3, 2, 8, 6))},
        }
    }


STACKED = lrx.Views(
    stacked=("layers/.*",),
    rules={"layers/experts/.*": lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))},
)


def sites(rules, tree=None, **options):
    return sorted(
        lrx.adapt(params() if tree is None else tree, rules, KEY, **options).train["sites"]
    )


# which leaves


def test_one_adapter_takes_all_linear_layers_but_heads():
    linear = sorted(f"layers_{i}/{name}/kernel" for i in (0, 1, 10) for name in "qv")
    assert sites(LORA) == sites({"all-linear": LORA}) == linear
    assert sites(
        {"all-linear": LORA},
        {"mlp": {"kernel": jnp.ones((4, 4))}, "conv": {"kernel": jnp.ones((3, 4))}},
    ) == ["conv/kernel", "mlp/kernel"]


def test_the_first_rule_that_matches_decides():
    rules = [("layers_0/q/.*kernel", None), (".*/q/kernel", A.lora(rank=3)), ("all-linear", LORA)]
    adaptation = lrx.adapt(params(), rules, KEY)
    assert "layers_0/q/kernel" not in adaptation.train["sites"]
    ranks = {path: own["a"].shape[1] for path, own in adaptation.train["sites"].items()}
    assert ranks == {
        "layers_0/v/kernel": 2,
        "layers_1/q/kernel": 3,
        "layers_1/v/kernel": 2,
        "layers_10/q/kernel": 3,
        "layers_10/v/kernel": 2,
    }


def test_patterns_match_whole_paths():
    assert sites({"layers_1/q/kernel": LORA}) == ["layers_1/q/kernel"]  # and not that of layers_10


def test_exclusions_win_over_rules():
    assert sites(LORA, exclude=(".*/q/kernel", "layers_1.*")) == ["layers_0/v/kernel"]
    assert sites(LORA, exclude="layers_.*/q/.*") == [f"layers_{i}/v/kernel" for i in (0, 1, 10)]


def test_embeddings_and_heads_are_adapted_where_a_rule_names_them():
    adaptation = lrx.adapt(params(), {"embed/embedding|head/kernel": LORA}, KEY)
    assert sorted(adaptation.train["sites"]) == ["embed/embedding", "head/kernel"]
    assert not adaptation.train["sites"]["embed/embedding"][
        "a"
    ].any()  # an embedding starts with a = 0
    assert adaptation.train["sites"]["head/kernel"]["a"].any()


def test_masked_leaves_are_not_there():
    tree = params() | {"layers_1": jax.tree.map(lambda _: optax.MaskedNode(), block())}
    assert sites(LORA, tree) == [f"layers_{i}/{name}/kernel" for i in (0, 10) for name in "qv"]


def test_views_fold_axes_and_boxes_name_layers():
    tree = {"q": {"kernel": jnp.ones((8, 2, 3))}, "o": {"kernel": jnp.ones((2, 3, 8))}}
    heads, out = lrx.MatrixView(rows=(0,), cols=(1, 2)), lrx.MatrixView(rows=(0, 1), cols=(2,))
    views = lrx.Views(rules={"q/.*": heads, "o/.*": out})
    shapes = jax.tree.map(jnp.shape, lrx.adapt(tree, LORA, KEY, views=views).train["sites"])
    assert shapes == {
        "q/kernel": {"a": (8, 2), "b": (2, 6)},
        "o/kernel": {"a": (6, 2), "b": (2, 8)},
    }
    boxed = {"kernel": nn.Partitioned(jnp.ones((3, 8, 6)), names=("layers", None, None))}
    assert lrx.adapt(boxed, LORA, KEY).train["sites"]["kernel"]["a"].shape == (3, 8, 2)


def test_layers_are_chosen_by_number_in_paths_and_in_stacks():
    assert sites(LORA, layers=(1, 10)) == [
        f"layers_{i}/{name}/kernel" for i in (1, 10) for name in "qv"
    ]
    named, pattern = {"encoder_7": block(), "encoder_8": block()}, r"encoder_(\d+)/.*"
    assert sites(LORA, named, layers=(7,), layers_pattern=pattern) == [
        f"encoder_7/{name}/kernel" for name in "qv"
    ]
    adaptation = lrx.adapt(stack(), LORA, KEY, views=STACKED, layers=(0, 2))
    scale = adaptation.frozen["sites"]["layers/q/kernel"]["scale"]
    assert scale.tolist() == [[4.0, 4.0], [0.0, 0.0], [4.0, 4.0]]
    assert adaptation.frozen["sites"]["layers/experts/kernel"]["scale"].any((1, 2)).tolist() == [
        True,
        False,
        True,
    ]
    assert adaptation.trained == 2 * (2 * 14) + 2 * 2 * (2 * 14)


# ranks and alphas


def test_ranks_and_alphas_follow_patterns():
    adaptation = lrx.adapt(
        params(),
        A.lora(rank=4, alpha=8.0),
        KEY,
        ranks={"layers_1/.*": 2, ".*/q/.*": 3},
        alphas={"layers_10/q/.*": 30.0},
    )
    scales = {path: own["scale"] for path, own in adaptation.frozen["sites"].items()}
    found = {path: (len(scale), round(float(scale[0]), 4)) for path, scale in scales.items()}
    assert found == {
        "layers_0/q/kernel": (3, 2.6667),
        "layers_0/v/kernel": (4, 2.0),
        "layers_1/q/kernel": (2, 4.0),
        "layers_1/v/kernel": (2, 4.0),
        "layers_10/q/kernel": (3, 10.0),
        "layers_10/v/kernel": (4, 2.0),
    }


def test_every_layer_of_a_stack_may_have_its_own_rank_and_alpha():
    lora = A.lora(rank=4, alpha=8.0, rank_stabilized=True)
    adaptation = lrx.adapt(
        stack(),
        lora,
        KEY,
        views=STACKED,
        ranks={"layers/q/kernel": (1, 4, 0)},
        alphas={"layers/q/kernel": (1.0, 2.0, 3.0)},
        exclude="layers/experts/.*",
    )
    scale = adaptation.frozen["sites"]["layers/q/kernel"]["scale"]
    np.testing.assert_allclose(scale, [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert adaptation.train["sites"]["layers/q/kernel"]["a"].shape == (3, 8, 4)
    assert adaptation.trained == 5 * 14
    assert "0 to 4" in str(adaptation)
    # only what is not padding acts
    full = adaptation.replace(train=jax.tree.map(jnp.ones_like, adaptation.train))
    change = lrx.effective(stack(), full)["layers"]["q"]["kernel"] - 1
    np.testing.assert_allclose(change[:, 0, 0], [1, 4, 0])


def test_adapters_of_one_rule_share_whatever_their_ranks():
    adapter = A.vera(rank=4)
    adaptation = lrx.adapt(params(), adapter, KEY, ranks={"layers_0/.*": 2, "layers_1/.*": 6})
    assert list(adaptation.frozen["shared"]) == ["vera"]
    assert adaptation.frozen["shared"]["vera"]["bank_a"].shape == (8, 6)
    assert adaptation.trained == 2 * ((2 + 6) + (6 + 6) + (4 + 6))


def test_groups_keep_apart_what_is_shared():
    rules = {
        ".*/q/kernel": A.uni_lora(rank=2, size=8),
        ".*/v/kernel": A.uni_lora(rank=2, size=8, group="values"),
    }
    adaptation = lrx.adapt(params(), rules, KEY)
    assert sorted(adaptation.train["shared"]) == ["unilora", "values"] and adaptation.trained == 16
    first, second = (adaptation.train["shared"][name]["theta"] for name in ("unilora", "values"))
    assert not np.array_equal(first, second)
    other = {".*/q/kernel": A.uni_lora(rank=2, size=8), ".*/v/kernel": A.uni_lora(rank=2, size=9)}
    assert sorted(lrx.adapt(params(), other, KEY).train["shared"]) == ["unilora", "unilora_1"]
    together = {
        f".*/{name}/kernel": A.uni_lora(rank=rank, size=8, group="g")
        for name, rank in (("q", 2), ("v", 3))
    }
    assert list(lrx.adapt(params(), together, KEY).train["shared"]) == ["g"]


def test_order_is_layer_by_layer_or_as_given():
    plan = lrx.adapt(stack(), LORA, KEY, views=STACKED, exclude=".*experts.*").layout
    assert plan.order == tuple(("layers/q/kernel", i) for i in range(3))
    paths = [path for path, _ in lrx.adapt(params(), LORA, KEY).layout.order]
    assert paths == [f"layers_{i}/{name}/kernel" for i in (0, 1, 10) for name in "qv"]
    given = tuple((path, 0) for path in reversed(paths))
    assert lrx.adapt(params(), LORA, KEY, order=given).layout.order == given


# what trains in full


def test_biases_and_whole_leaves_train_beside_the_adapters():
    def whole(**options):
        return sorted(lrx.adapt(params(), {".*/q/kernel": LORA}, KEY, **options).train["trainable"])

    assert whole() == []
    assert whole(bias="adapted") == [f"layers_{i}/q/bias" for i in (0, 1, 10)]
    assert len(whole(bias="all")) == 7
    assert whole(trainable="head/.*") == ["head/bias", "head/kernel"]
    assert sorted(lrx.adapt(params(), {}, KEY, trainable=("norm/.*",)).train["trainable"]) == [
        "norm/scale"
    ]


def test_whole_leaves_reach_the_model_in_their_boxes():
    head = nn.Partitioned(jnp.ones((8, 9)), names=(None, "vocab"))
    tree = {"q": {"kernel": jnp.ones((8, 6))}, "head": {"kernel": head}}
    adaptation = lrx.adapt(tree, LORA, KEY, trainable="head/kernel")
    assert adaptation.train["trainable"]["head/kernel"].shape == (8, 9)
    moved = adaptation.replace(train=jax.tree.map(lambda x: x + 1, adaptation.train))
    for form in (lrx.attach, lrx.effective, lrx.merge):
        head = form(tree, moved)["head"]["kernel"]
        assert (
            isinstance(head, nn.Partitioned)
            and head.names == (None, "vocab")
            and float(head.value[0, 0]) == 2.0
        )


def test_a_leaf_trained_whole_by_one_adaptation_may_be_adapted_by_another():
    tree = {"q": {"kernel": jnp.ones((8, 6))}}
    whole, lora = (
        lrx.adapt(tree, {}, KEY, trainable="q/kernel", name="whole"),
        lrx.adapt(tree, LORA, KEY, name="lora"),
    )
    both = {"trainable": whole, "lora": lora}
    both = {
        name: one.replace(train=jax.tree.map(lambda x: x + 1.0, one.train))
        for name, one in both.items()
    }
    x, kernel = jnp.ones((2, 8)), lrx.effective(tree, both)["q"]["kernel"]
    alone = lrx.effective({"q": {"kernel": 2 * jnp.ones((8, 6))}}, both["lora"])["q"]["kernel"]
    np.testing.assert_allclose(kernel, alone, rtol=1e-6)
    np.testing.assert_allclose(
        lrx.matmul(x, lrx.attach(tree, both)["q"]["kernel"]), x @ alone, rtol=1e-5
    )


def test_boxes_survive_a_merge_and_the_way_back():
    tree = {"kernel": nn.Partitioned(jnp.ones((8, 6)), names=("in", "out"))}
    adaptation = lrx.adapt(tree, LORA, KEY)
    merged = lrx.merge(tree, adaptation)
    for back in (
        merged,
        lrx.adapters.unmerge(merged, adaptation),
        lrx.adapters.unmerge(merged, adaptation, base=tree),
    ):
        assert isinstance(back["kernel"], nn.Partitioned) and back["kernel"].names == ("in", "out")
    with pytest.raises(ValueError, match=r"base: leaves \['kernel'\] are missing"):
        lrx.adapters.unmerge(merged, adaptation, base={})


def test_two_adaptations_must_see_a_leaf_alike():
    tree = {"kernel": jnp.ones((2, 3, 6))}
    views = [
        lrx.Views(rules={"kernel": lrx.MatrixView(rows=rows, cols=(2,))})
        for rows in ((0, 1), (1, 0))
    ]
    both = {
        name: lrx.adapt(tree, LORA, KEY, views=own, name=name)
        for name, own in zip("ab", views, strict=True)
    }
    for form in (lrx.attach, lrx.effective):
        with pytest.raises(
            ValueError, match="'kernel' is seen as .* by one active adaptation and as .* by another"
        ):
            form(tree, both)


# starts


def test_keys_belong_to_names_and_not_to_the_tree():
    """A leaf starts alike whatever else is adapted; another name, path, layer or key starts
    otherwise."""

    def start(rules, key=KEY, **options):
        return lrx.adapt(params(), rules, key, **options).train["sites"]

    alone, all_of_them = start({"layers_1/q/kernel": LORA}), start(LORA)
    assert np.array_equal(alone["layers_1/q/kernel"]["a"], all_of_them["layers_1/q/kernel"]["a"])
    draws = [
        all_of_them["layers_1/q/kernel"]["a"],
        all_of_them["layers_1/v/kernel"]["a"],
        start(LORA, name="other")["layers_1/q/kernel"]["a"],
        start(LORA, jax.random.key(1))["layers_1/q/kernel"]["a"],
    ]
    assert len({float(draw[0, 0]) for draw in draws}) == 4


def test_initialisers_see_the_statistics_that_are_given():
    class Seen(A.lora):
        def init_site(self, key, site, kernel, given):
            ones = jnp.ones((site.n, site.rank))
            return {
                "a": given["stats"]["mean"][:, None] * ones,
                "b": jnp.zeros((site.rank, site.m)),
            }, {}

    stats = {"layers/q/kernel": {"mean": jnp.arange(24.0).reshape(3, 8)}}
    adaptation = lrx.adapt(
        stack(), Seen(rank=2), KEY, views=STACKED, exclude=".*experts.*", stats=stats
    )
    found, wanted = (
        adaptation.train["sites"]["layers/q/kernel"]["a"],
        stats["layers/q/kernel"]["mean"],
    )
    assert np.array_equal(found[..., 0], wanted)


# the report


def test_the_report_says_what_trains():
    rules = {
        ".*/q/kernel": A.uni_lora(rank=2, size=8),
        ".*/v/kernel": A.miss(rank=4),
        "head/kernel": A.oft(block=4),
    }
    tree = {name: params()[name] for name in ("layers_0", "norm", "head")}
    assert str(lrx.adapt(tree, rules, KEY, trainable="norm/scale", bias="adapted")) == "\n".join(
        [
            "leaf               shape   adapter  rank  trained",
            "head/kernel        (8, 9)  oft      -     12",
            "layers_0/q/kernel  (8, 6)  unilora  2     0",
            "layers_0/v/kernel  (8, 6)  miss     4     24",
            "(shared by 1)              unilora  -     8",
            "head/bias          (9,)    in full  -     9",
            "layers_0/q/bias    (6,)    in full  -     6",
            "layers_0/v/bias    (6,)    in full  -     6",
            "norm/scale         (8,)    in full  -     8",
            "3 leaves adapted, 4 trained in full: 73 trained, 168 frozen of the model's 197 "
            "parameters (37.1 %)",
        ]
    )


# errors

UNUSED = {
    "rules": ({"rules": {".*/query/kernel": LORA}}, r"rules: '.\*/query/kernel' matches no leaf"),
    "shadowed": ({"rules": [(".*/q/.*l", LORA), ("layers_0/q/kernel", LORA)]}, "rules: 'layers_0/q/kernel' matches no"),
    "near": ({"rules": {"layers_0/k/kernel": LORA}}, r"Did you mean \[.*'layers_0/q/kernel'.*\]\?"),
    "exclude": ({"exclude": "layers_0/k/kernel"}, r"exclude: 'layers_0/k/kernel' .* Did you mean"),
    "trainable": ({"trainable": "heads/.*"}, r"trainable: 'heads/\.\*' matches no leaf"),
    "ranks": ({"ranks": {"layers_0/k/kernel": 3}}, r"ranks: 'layers_0/k/kernel' .* Did you mean"),
    "ranks of none": ({"ranks": {"head/kernel": 3}}, "ranks: 'head/kernel' matches no leaf that it could apply to"),
    "alphas": ({"alphas": {"layers_0/k/kernel": 3.0}}, r"alphas: 'layers_0/k/kernel' .* Did you mean"),
    "views": ({"views": lrx.Views(stacked="blocks/.*")}, r"views: 'blocks/\.\*' matches no leaf"),
    "layers": ({"layers": (0, 2)}, r"no adapted leaf is of layer \[2\], only of \['0', '1', '10'\]"),
    "nothing": ({"rules": {}}, r"nothing is adapted and nothing trained in full. Paths here: \['embed/embedding'"),
    "no matrix": ({"rules": {"norm/.*": LORA}}, "'norm/scale' of shape .* is no matrix; write the pattern of"),
    "both": ({"trainable": ".*/q/kernel"}, "'layers_0/q/kernel' is adapted and trained in full; choose one"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' must be one of"),
    "no adapter": ({"rules": {".*": "lora"}}, "'lora' is neither an adapter such as"),
    "regex": ({"rules": {"(": LORA}}, r"rules: '\(' is not a regular expression"),
    "regex exclude": ({"exclude": "["}, r"exclude: '\[' is not a regular expression"),
    "no number": ({"layers": (0,), "layers_pattern": "layers_.*"}, "layers_pattern='layers_.*' has no group"),
    "no rank": ({"rules": A.oft(block=4), "ranks": {".*/q/kernel": 2}}, "ranks: .* oft has no rank"),
    "no alpha": ({"rules": A.hira(rank=4), "alphas": {".*/q/kernel": 2}}, "alphas: .* hira has no alpha"),
    "many ranks": ({"ranks": {".*/q/kernel": (1, 2)}}, "gives 2 for 1 of 'layers_0/q/kernel'"),
    "order": ({"order": (("layers_0/q/kernel", 0),)}, "order: names 1 matrices, the adapted ones are"),
    "rank fits": ({"rules": A.lora(rank=2, init="pissa"), "ranks": {".*/v/kernel": 7}}, "rank=7 exceeds the 6 sing"),
    "group": ({"rules": {".*/q/kernel": A.uni_lora(size=9, group="g"), ".*": A.uni_lora(size=8, group="g")},
               "exclude": (".*bias", "norm.*")}, "group='g' holds .*size=9.*cannot share"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
def test_what_cannot_be_is_an_error_that_says_how(name):
    options, message = UNUSED[name]
    with pytest.raises(ValueError, match=message):
        lrx.adapt(
            params(),
            options.get("rules", LORA),
            KEY,
            **{k: v for k, v in options.items() if k != "rules"},
        )


def test_axes_that_nobody_claimed_are_an_error():
    with pytest.raises(ValueError, match=r"A proposal:\nleaf .*\nq     \(3, 8, 6\)  3x48"):
        lrx.adapt({"q": jnp.ones((3, 8, 6))}, {"q": LORA}, KEY)


@pytest.mark.parametrize("adapter", [A.miss(rank=2), A.shira(rank=1)], ids=["miss", "shira"])
def test_ranks_that_cannot_be_padded_are_one_in_a_stack(adapter):
    tree, views = {"kernel": jnp.ones((2, 8, 6))}, lrx.Views(stacked="kernel")
    with pytest.raises(
        ValueError, match=r"ranks: \(1, 2\) for 'kernel'; those of .* cannot be padded"
    ):
        lrx.adapt(tree, adapter, KEY, views=views, ranks={"kernel": (1, 2)})
    adaptation = lrx.adapt(tree, adapter, KEY, views=views, ranks={"kernel": (2, 0)})
    assert adaptation.trained == adaptation.layout.adapters[0].count(adaptation.layout.sites[0])


def test_quantised_leaves_are_adapted_and_not_trained_whole():
    tree = {"q": {"kernel": lrx.linalg.quantize_blocks(jnp.ones((8, 6)))}}
    assert lrx.adapt(tree, LORA, KEY).trained == 28
    with pytest.raises(
        ValueError, match="trainable: 'q/kernel' is quantised, and codes do not train"
    ):
        lrx.adapt(tree, {}, KEY, trainable="q/kernel")


def test_the_tree_must_be_the_one_that_adapt_saw():
    adaptation = lrx.adapt(params(), LORA, KEY)
    wrong = params() | {"layers_0": block(m=5)}
    for form in (lrx.attach, lrx.effective, lrx.merge, lrx.adapters.unmerge):
        with pytest.raises(
            ValueError, match=r"'layers_0/q/kernel', \(8, 6\), is of shape \(8, 5\); give the tree"
        ):
            form(wrong, adaptation)
    without = {name: own for name, own in params().items() if name != "layers_1"}
    with pytest.raises(ValueError, match="'layers_1/q/kernel', .* is missing"):
        lrx.attach(without, adaptation)
    with pytest.raises(
        ValueError, match=r"active: \['new'\] are not among the adaptations \['default'\]"
    ):
        lrx.attach(params(), adaptation, active=("new",))
    both = {name: lrx.adapt(params(), {}, KEY, trainable="norm/scale", name=name) for name in "ab"}
    with pytest.raises(
        ValueError, match=r"\['norm/scale'\] are trained in full by two active adaptations"
    ):
        lrx.attach(params(), both)
    with pytest.raises(
        ValueError, match="were trained in full; only base= brings back what they were"
    ):
        lrx.adapters.unmerge(params(), both["a"])


def test_merge_refuses_what_is_not_finite():
    adaptation = lrx.adapt(params(), {".*/q/kernel": LORA}, KEY)
    train = jax.tree.map(lambda x: x, adaptation.train)
    train["sites"]["layers_1/q/kernel"]["b"] = jnp.full((2, 6), jnp.nan)
    with pytest.raises(ValueError, match=r"\['layers_1/q/kernel'\] are not finite"):
        lrx.merge(params(), adaptation.replace(train=train))


BOUNDS = {  # on a kernel of 6 x 4
    "lora": (A.lora, 4), "dora": (A.dora, 4), "hira": (A.hira, 4),
    "loha": (A.loha, 4), "uni_lora": (A.uni_lora, 4), "vera": (A.vera, 24),
    "miss": (A.miss, 6), "shira": (A.shira, 2), "rand_lora": (A.rand_lora, 4), "dylora": (A.dylora, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_a_rank_larger_than_a_matrix_can_have_is_refused_with_the_familys_own_bound(name):
    family, bound = BOUNDS[name]
    options = {"size": 8} if name == "uni_lora" else {}
    params = {"stack": jnp.ones((2, 6, 4)), "one": jnp.ones((6, 4))}
    adapt = functools.partial(lrx.adapt, params, key=KEY, views=lrx.Views(stacked=("stack",)))
    error = (
        f"rank=99999 exceeds {bound}, the largest of {family.__name__.lower()} on a 6 x 4 kernel; "
        "use at mo"
    )
    for rules, ranks in (
        ({".*": family(rank=99999, **options)}, ()),
        ({"one": family(rank=99999, **options)}, ()),
    ):
        with pytest.raises(ValueError, match=error):
            adapt(rules, ranks=ranks)
    adapt({".*": family(rank=bound, **options)})
    if family.ranked:  # one matrix of a stack, which pads the others
        with pytest.raises(
            ValueError, match=f"'stack': rank={bound + 1} exceeds {bound},.* by ranks="
        ):
            adapt({".*": family(rank=1, **options)}, ranks={"stack": (1, bound + 1)})
        adapt({".*": family(rank=99999, **options)}, ranks={".*": 1})
    with pytest.raises(ValueError, match=error):
        family(rank=99999, **options).start(KEY, jnp.ones((6, 4)))


def test_where_no_rank_fits_the_leaf_is_to_be_left_out():
    """SHiRA of rank 1 would train more entries than a single row has; a rank of 0 is no remedy."""
    with pytest.raises(
        ValueError,
        match="rank=1 exceeds 0, the largest of shira on a 1 x 64 kernel; leave it out by",
    ):
        lrx.adapt({"one": jnp.ones((1, 64))}, {".*": A.shira(rank=1)}, KEY)


def test_every_family_with_a_rank_has_a_bound():
    families = [
        one for one in vars(A).values() if isinstance(one, type) and issubclass(one, A.Adapter)
    ]
    named = {one for one in families if "rank" in {field.name for field in dataclasses.fields(one)}}
    assert named == {family for family, _ in BOUNDS.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triple(A.lora):
    """A family that gives its factors without the ranks to which they belong."""

    def factors(self, site, p):
        return p["a"], p["scale"], p["b"]


def test_factors_of_another_kind_are_refused_by_the_name_of_the_family():
    tree = {"kernel": jnp.ones((4, 6))}
    adaptation = lrx.adapt(tree, Triple(rank=2), KEY)
    attached = lrx.attach(tree, adaptation)
    message = (
        r"Triple.factors gives a tuple; return None or lrx.adapters.Factors\(a, scale, b, rank_of\)"
    )
    for use in (
        lambda: lrx.matmul(jnp.ones((3, 4)), attached["kernel"]),
        lambda: lrx.effective(tree, adaptation),
        lambda: lrx.to_lora(tree, adaptation),
    ):
        with pytest.raises(TypeError, match=message):
            use()
