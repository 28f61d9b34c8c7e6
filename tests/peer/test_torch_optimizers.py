"""At the identity projector a projection optimizer is its inner one: torch's AdamW, trained on the
same loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_identity_projector_is_torch_adamw(shape, weight_decay):
    rng = np.random.default_rng(0)
    inputs, targets = (rng.normal(size=(20, n)).astype(np.float32) for n in shape)
    start = rng.normal(size=shape).astype(np.float32)

    weight = torch.nn.Parameter(torch.tensor(start))
    peer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=weight_decay)
    for _ in range(10):
        peer.zero_grad()
        torch.mean((torch.tensor(inputs) @ weight - torch.tensor(targets)) ** 2).backward()
        peer.step()

    tx = lrx.frugal(
        1e-2, projector=lrx.projectors.identity(), rule="discard", weight_decay=weight_decay
    )
    params = {"kernel": jnp.asarray(start)}
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        grads = jax.grad(lambda p: jnp.mean((inputs @ p["kernel"] - targets) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = update(params, state)
    np.testing.assert_allclose(params["kernel"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)
