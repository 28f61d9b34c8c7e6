"""What a server makes of the adapters that its clients trained."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.families.lora import Lora
from lowrank_jax.checks import check_number
from lowrank_jax.typing import Pytree, Scalar


def fed_svd(
    server: Adaptation, clients: Sequence[Pytree], weights: Sequence[Scalar] | None = None
) -> Adaptation:
    """FedSVD (Lee et al., NeurIPS 2025): clients train b on one frozen a, and between rounds the
    server turns a, within its span, to the leading inputs of what they learnt.

    With the mean b̄ of the clients' b `(r, m)`, whose product with the common a `(n, r)` is exactly
    the mean of their products, and its singular vectors,

        a b̄ = U S Vᵀ,   a <- U,   b <- S Vᵀ

    (the paper writes the transpose: its A is our aᵀ). So the adapted kernels are the mean of the
    clients', and a has orthonormal columns, by which the gradient of b, and the noise that privacy
    adds to it, are bounded. Two thin QR factorisations and an SVD of r x r make it, never the
    product; signs are canonical. Where r exceeds n or m, what is left of both factors is zero.

    Paper: https://arxiv.org/abs/2505.12805, whose alpha is r, and whose clients take SGD with rate
    .5. There is no state, and as there each client starts its optimizer again at every round:
    `tx.init(adaptation.train)`.

    Args:
      server: what the clients began the round with: `lrx.adapters.lora(trains="b")` on all sites.
      clients: `adaptation.train` of each after it. Leaves trained in full are averaged too.
      weights: shares of the clients, for instance their numbers of examples; the same by default.

    Returns:
      The adaptation with which the next round begins.

    Raises:
      ValueError: without clients; for a tree that is not like the server's; for weights that are
        negative, all zero, or not one a client; for an adapter that is not LoRA with b alone.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.zeros((4, 6))}
    >>> server = lrx.adapt(params, lrx.adapters.lora(rank=2, trains="b"), jax.random.key(0))
    >>> trained = jax.tree.map(lambda b: b + jnp.eye(2, 6), server.train)
    >>> a = fed_svd(server, [server.train, trained], [1, 3]).frozen["sites"]["kernel"]["a"]
    >>> (abs(a.T @ a).round(3)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_clients(server, clients)
    shares = _shares(weights, len(clients))

    def mean(*leaves):
        found = zip(shares, leaves, strict=True)
        total = sum(share * leaf.astype(jnp.float32) for share, leaf in found)
        return total.astype(leaves[0].dtype)

    train = jax.tree.map(mean, *clients)
    kept, trained = dict(server.frozen["sites"]), dict(train["sites"])
    for path, own in kept.items():
        a, b = _turned(own["a"], trained[path]["b"], own["scale"])
        kept[path] = own | {"a": a}
        trained[path] = trained[path] | {"b": b}
    return server.replace(train=train | {"sites": trained}, frozen=server.frozen | {"sites": kept})


def _turned(a: jax.Array, b: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`U (..., n, r)` and `S Vᵀ (..., r, m)` of `a b`."""
    # ranks that a shorter adapter of a stack does not have count for nothing
    live = jnp.where(scale[..., None, :] != 0, a.astype(jnp.float32), 0)
    left, values, right = linalg.svd_of_product(live, b.astype(jnp.float32))
    # r may exceed n or m, of which there are that many singular vectors
    missing = a.shape[-1] - values.shape[-1]
    batch = [(0, 0)] * (a.ndim - 2)
    left = jnp.pad(left, [*batch, (0, 0), (0, missing)])
    right = jnp.pad(values[..., None] * right, [*batch, (0, missing), (0, 0)])
    return left.astype(a.dtype), right.astype(b.dtype)


def _shares(weights: Sequence[Scalar] | None, count: int) -> list[Scalar]:
    """One share for each client; their sum is 1."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise ValueError(f"fed_svd: {len(given)} weights for {count} clients; give one for each")
    for weight in given:
        check_number("fed_svd: weights", weight, at_least=0)
    total = sum(given)
    if not isinstance(total, jax.core.Tracer) and total == 0:
        raise ValueError(f"fed_svd: weights={given} are all zero")
    return [weight / total for weight in given]


def _check_clients(server: Adaptation, clients: Sequence[Pytree]) -> None:
    if not clients:
        raise ValueError("fed_svd: there are no clients; give the tree that each of them trained")
    for path, (adapter, _) in server.layout.by_path.items():
        if not (isinstance(adapter, Lora) and adapter.trains == "b"):
            raise ValueError(
                f"fed_svd: {path!r} has {adapter!r}; the mean of products is a product where all "
                "clients have one a, as of lrx.adapters.lora(trains='b')"
            )
    shapes = jax.tree.map(lambda x: x.shape, server.train)
    for number, client in enumerate(clients):
        if jax.tree.map(lambda x: x.shape, client) != shapes:
            raise ValueError(
                f"fed_svd: the tree of client {number} is not like server.train; give the "
                "adaptation.train that it trained"
            )
