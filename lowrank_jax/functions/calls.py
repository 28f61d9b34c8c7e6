"""Calls: the programs within a program, read with the nodes that go into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.functions import hosts
from lowrank_jax.functions.equations import bind, closed, scan_counts
from lowrank_jax.functions.errors import ReadError
from lowrank_jax.functions.flow import Flow, is_flow
from lowrank_jax.functions.hosts import PRODUCTS
from lowrank_jax.kernel_node import with_parts_of

Values = list[Any]


class Reader(Protocol):
    """What reads a program, see `reader.Reader`."""

    dense: tuple[str, ...]
    outer: tuple[Any, ...]
    used: set[str]
    beside: dict[str, list[Any]]
    kept: dict[Any, Any]

    def read(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> Values: ...

    def within(self, eqn: Any, used: set[str] | None = None) -> Reader: ...

    def line(self, eqn: Any) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The program of a call, to be read once or more."""

    reader: Reader
    eqn: Any
    jaxpr: Any
    consts: tuple[Any, ...] = ()

    @classmethod
    def of(cls, reader: Reader, eqn: Any, jaxpr: Any) -> Body:
        inner, consts = closed(jaxpr)
        return cls(reader, eqn, inner, tuple(consts))

    def __call__(self, *values: Any) -> tuple[Values, dict[str, list[Any]]]:
        """`(results, what was given beside products)`."""
        own = self.reader.within(self.eqn)
        return own.read(self.jaxpr, self.consts, values), own.beside

    def alone(self, *values: Any) -> Values:
        """The results, of a body in which nothing may be given beside products."""
        made, beside = self(*values)
        if beside:
            raise ReadError(
                f"gives a value beside its product ({sorted(beside)}) within "
                f"{self.eqn.primitive.name}, out of which it cannot be handed"
            )
        return made


def handed(reader: Reader, made: tuple[Values, dict[str, list[Any]]]) -> Values:
    """The results; what was given beside them goes on."""
    values, beside = made
    for path, found in beside.items():
        reader.beside.setdefault(path, []).extend(found)
    return values


def jit(reader: Reader, eqn: Any, given: Values) -> Values:
    """A jit within the program stays one, with its name, its shardings and its options.

    It is compiled once for all readings, whatever the numbers in the nodes.
    """
    key = (id(eqn), jax.tree.structure(given))
    if key not in reader.kept:
        reader.kept[key] = eqn, *_compiled(reader, eqn)
    _, compiled, used = reader.kept[key]
    values = handed(reader, compiled(*given))
    reader.used.update(used)
    return list(map(_placed, values, eqn.params["out_shardings"]))


def _compiled(reader: Reader, eqn: Any) -> tuple[Callable[..., Any], set[str]]:
    """A jit of what reads the program, and the leaves that it was seen to use."""
    params = eqn.params
    jaxpr, consts = closed(params["jaxpr"])
    used: set[str] = set()

    def run(*values):
        inner = reader.within(eqn, used)
        placed = list(map(_placed, values, params["in_shardings"]))
        return inner.read(jaxpr, consts, placed), inner.beside

    run.__name__ = run.__qualname__ = params["name"]
    options = dict(params.get("compiler_options_kvs") or ())
    made = jax.jit(run, inline=params.get("inline", False), compiler_options=options or None)
    return made, used


def _placed(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if is_flow(value):
        return dataclasses.replace(value, array=_placed(value.array, sharding))
    return value if value is None else jax.lax.with_sharding_constraint(value, sharding)


def remat(reader: Reader, eqn: Any, given: Values) -> Values:
    """A remat stays one, with its policy."""
    params = eqn.params
    body = Body.of(reader, eqn, params["jaxpr"])
    run = jax.checkpoint(
        lambda *values: body(*values), prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return handed(reader, run(*given))


def custom_jvp(reader: Reader, eqn: Any, given: Values) -> Values:
    """By the derivative of its program: the rule of the call is one of arrays."""
    return handed(reader, Body.of(reader, eqn, eqn.params["call_jaxpr"])(*given))


def custom_vjp(reader: Reader, eqn: Any, given: Values) -> Values:
    """What JAX does not show: an error."""
    del reader, given
    raise ReadError(
        "goes into a function with a derivative of its own (custom_vjp), or into a kernel, where no "
        "product can be seen: register what it computes by lrx.adapters.rule(name, function)"
    )


# -------------------------------------------------------------------------- scan


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A flow that a scan takes apart along the first axis of its value."""

    flow: Flow

    @property
    def digit(self) -> Any:
        digits = self.flow.axes.value[0]
        if len(digits) != 1 or self.flow.place(digits[0]) < 0:
            raise ReadError(
                "is scanned along an axis that is no batch axis of its view: stack it, "
                "Views(stacked=(path,))"
            )
        return digits[0]

    def parts(self) -> Any:
        """What is scanned: arrays with that axis in front."""
        place = self.flow.place(self.digit)
        own, _ = self.flow.own()
        return self.flow.array, jax.tree.map(lambda x: jnp.moveaxis(x, place, 0), own)

    def layer(self, parts: Any) -> Flow:
        """The flow of one step."""
        array, own = parts
        _, shared = self.flow.own()
        axes = self.flow.axes.squeeze((0,)).without(self.digit)
        return dataclasses.replace(
            self.flow, array=array, node=with_parts_of(self.flow.node, own, shared), axes=axes
        )


def scan(reader: Reader, eqn: Any, given: Values) -> Values:
    """Constants are closed over, stacked nodes are scanned, carried ones handed through."""
    params = eqn.params
    constants, carries = scan_counts(params)
    consts, carry = given[:constants], given[constants : constants + carries]
    scanned = [Scanned(one) if is_flow(one) else one for one in given[constants + carries :]]
    body = Body.of(reader, eqn, params["jaxpr"])
    plain: list[Any] = [None if isinstance(one, Scanned) else one for one in scanned]
    stacked = [one.parts() if isinstance(one, Scanned) else None for one in scanned]
    returned: dict[int, Flow] = {}

    def step(carry, xs):
        own, parts = xs
        layers = [
            one.layer(part) if isinstance(one, Scanned) else x
            for one, x, part in zip(scanned, own, parts, strict=True)
        ]
        made, beside = body(*consts, *carry, *layers)
        ys = made[carries:]
        for number, y in enumerate(ys):
            if is_flow(y):
                # a layer that is handed back, stacked, is what was scanned
                returned[number] = _handed_back(y, layers, scanned)
        return made[:carries], ([None if is_flow(y) else y for y in ys], beside)

    carry, (ys, beside) = jax.lax.scan(
        step, carry, (plain, stacked), length=params["length"], reverse=params["reverse"],
        unroll=params["unroll"],
    )  # fmt: skip
    handed(reader, ([], beside))
    return [*carry, *(returned.get(number, y) for number, y in enumerate(ys))]


def _handed_back(y: Flow, layers: Sequence[Any], scanned: Sequence[Any]) -> Flow:
    # steps of a program change what is static of a flow
    static: Any = jax.tree.structure(y)
    for layer, one in zip(layers, scanned, strict=True):
        if isinstance(one, Scanned) and jax.tree.structure(layer) == static:
            return one.flow
    raise ReadError("is returned from a scan, changed, at every step")


# --------------------------------------------------------------------- branches


def cond(reader: Reader, eqn: Any, given: Values) -> Values:
    """Branches take nodes as operands, and hand them through."""
    index, *operands = given
    branches = [Body.of(reader, eqn, branch).alone for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def while_(reader: Reader, eqn: Any, given: Values) -> Values:
    """Constants are closed over, carried nodes handed through."""
    params = eqn.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = given[:of_cond], given[of_cond : of_cond + of_body]
    goes_on = Body.of(reader, eqn, params["cond_jaxpr"]).alone
    body = Body.of(reader, eqn, params["body_jaxpr"]).alone
    return jax.lax.while_loop(
        lambda carry: goes_on(*cond_consts, *carry)[0],
        lambda carry: body(*body_consts, *carry),
        given[of_cond + of_body :],
    )


# --------------------------------------------------------------- registered calls


def replaced(reader: Reader, eqn: Any, given: Values, equivalent: Callable[..., Any]) -> Values:
    """A call that is a product without JAX showing it: its own for the kernel, the product of
    `equivalent` for what lies on it."""
    places = [i for i, one in enumerate(given) if is_flow(one)]
    if len(places) != 1:
        raise ReadError("goes into a registered product together with another node")
    (place,) = places
    flow: Flow = given[place]
    product, kernel, program, order = one_product(eqn, equivalent, place)
    axes = flow.axes.transpose(order)
    host = PRODUCTS[product.primitive.name](product, kernel, axes, flow.dtype, reader.line(eqn))
    index = {variable: i for i, variable in enumerate(program.invars)}
    x = index[product.invars[host.x_place]]
    rest = [
        given[index[v]] for i, v in enumerate(product.invars) if i not in (host.place, host.x_place)
    ]
    called = _called(host, eqn, tuple(given), (place, x), order)
    array = None if flow.array is None else jnp.transpose(flow.array, order)
    reader.used.add(flow.path)
    y, aux = hosts.times(called, flow.node, array, rest, given[x])
    if aux is not None and jax.tree.leaves(aux):
        reader.beside.setdefault(flow.path, []).append(aux)
    return [y.astype(eqn.outvars[0].aval.dtype)]


def one_product(eqn: Any, equivalent: Callable[..., Any], place: int) -> tuple[Any, int, Any, Any]:
    """`(equation, its operand that is the kernel, program, permutation)` of the one product that an
    equivalent makes of a kernel, which it may transpose first."""
    program = jax.make_jaxpr(equivalent)(*(var.aval for var in eqn.invars)).jaxpr
    kernel, order = program.invars[place], tuple(range(eqn.invars[place].aval.ndim))
    product = None
    for one in program.eqns:
        if kernel not in one.invars:
            continue
        if one.primitive.name == "transpose":
            kernel = one.outvars[0]
            order = tuple(order[axis] for axis in one.params["permutation"])
        elif one.primitive.name in PRODUCTS:
            product = one
    known = {*program.invars, kernel}
    if (
        product is None
        or product.outvars[0] is not program.outvars[0]
        or any(variable not in known for variable in product.invars)
    ):
        raise ReadError(
            "goes into a call whose rule is no single product: register a function of the same "
            "operands that makes one product of the kernel and returns it"
        )
    return product, product.invars.index(kernel), program, order


def _called(host: Any, eqn: Any, given: tuple[Any, ...], places: Any, order: Any) -> Any:
    """A host whose own product is a call of the program."""
    place, x_place = places
    back = tuple(int(i) for i in np.argsort(order))

    def run(self, x, array, rest, wide=False):
        del self, rest, wide
        operands = list(given)
        operands[place], operands[x_place] = jnp.transpose(array, back), x
        return bind(eqn, operands)[0]

    cls = type("Called" + type(host).__name__, (type(host),), {"run": run, "opaque": True})
    return cls(**{field.name: getattr(host, field.name) for field in dataclasses.fields(host)})


RULES: dict[str, Callable[[Reader, Any, Values], Values]] = {
    "jit": jit,
    "pjit": jit,
    "closed_call": custom_jvp,
    "remat2": remat,
    "remat3": remat,
    "checkpoint": remat,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "custom_vjp_call_jaxpr": custom_vjp,
    "pallas_call": custom_vjp,
    "scan": scan,
    "cond": cond,
    "while": while_,
}
