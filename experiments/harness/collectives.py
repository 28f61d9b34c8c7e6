"""What a compiled program sends between devices, read from its text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_CALLS = "body|condition|to_apply|calls|true_computation|false_computation"

# Bytes of an element, by HLO's name of its type; a predicate takes one.
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16} | {
    f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f") for bits in (4, 8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One tensor that a collective gives, on one device.

    Attributes:
      kind: one of KINDS.
      dtype, shape: of the result: of an all-gather the gathered tensor, of a reduce-scatter the
        part.
      times: how often it runs in a call of the program: the trips of the loops that it stands in.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int

    @property
    def bytes(self) -> int:
        """Of the results of all times."""
        size = next((size for name, size in _BYTES.items() if name == self.dtype), 1)
        return round(self.times * math.prod(self.shape) * size)


def read(text: str) -> list[Collective]:
    """Every collective of a compiled program's text, equal ones added up, the largest first.

    A collective that XLA runs asynchronously is counted once, at its start; of the tuple that a
    start gives, the results are the second half. A loop whose trips the program does not know
    counts as one trip.

    >>> text = '''%body.1 (x: f32[]) -> f32[] {
    ...   %r = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1
    ... }
    ... ENTRY %main (x: f32[]) -> f32[] {
    ...   %w = f32[] while(%x), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"4"}}
    ...   %s = (bf16[5]{0}, bf16[10]{0}) all-gather-start(%d), channel_id=2
    ... }'''
    >>> for found in read(text):
    ...     print(found.kind, found.dtype, found.shape, found.times, found.bytes)
    all-reduce f32 (2, 3) 4 96
    all-gather bf16 (10,) 1 20
    all-reduce f32 () 4 16
    """
    inside = _computations(text)
    times = _times(inside)
    found: collections.Counter[tuple[str, str, tuple[int, ...]]] = collections.Counter()
    for name, lines in inside.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if not match:
                continue
            result, kind, is_start = match.groups()
            shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
            # an asynchronous start gives (operands, results), then some contexts
            if is_start and kind != "all-reduce":
                data = [shape for shape in shapes if shape[0] not in ("u32", "s32")] or shapes
                shapes = data[len(data) // 2 :]
            for dtype, size in shapes:
                shape = tuple(int(n) for n in size.split(",") if n)
                found[kind, dtype, shape] += times.get(name, 1)
    made = [Collective(kind, dtype, shape, count) for (kind, dtype, shape), count in found.items()]
    return sorted(made, key=lambda one: (-one.bytes, one.kind, one.shape))


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation."""
    inside: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = opened.group(1) if opened else name
        inside.setdefault(name, []).append(line)
    return inside


def _times(inside: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs: the trips of all loops around it."""
    # {computation: (the one that calls it, how often it does in one run of itself)}
    callers: dict[str, tuple[str, int]] = {}
    for name, lines in inside.items():
        for line in lines:
            count = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', line)
            for kind, target in re.findall(rf"\b({_CALLS})=%?([\w.\-]+)", line):
                trips = int(count.group(1)) if count and kind == "body" else 1
                callers.setdefault(target, (name, trips))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for target in re.findall(r"%?([\w.\-]+)", branches):
                    callers.setdefault(target, (name, 1))
    times = {}
    for name in inside:
        # up to the entry; `seen` ends a circle, which a damaged text may have
        total, where, seen = 1, name, set()
        while where in callers and where not in seen:
            seen.add(where)
            where, trips = callers[where]
            total *= trips
        times[name] = total
    return times


def by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes of each kind that occurs.

    >>> by_kind(
    ...     [Collective("all-reduce", "f32", (2,), 3), Collective("all-reduce", "bf16", (2,), 1)]
    ... )
    {'all-reduce': 28}
    """
    total: collections.Counter[str] = collections.Counter()
    for one in found:
        total[one.kind] += one.bytes
    return dict(total)
