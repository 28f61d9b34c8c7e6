"""A compiled program's text made ready for `experiments.harness.collectives.read`.

That knows loops and branches by name only.

XLA:TPU does not write the trips of a loop, and writes a collective that it overlaps with
computation into several fused computations, all with one channel.
"""

import re
from typing import Any

from experiments.harness import collectives


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, from its head to its brace, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            name = opened.group(2)
            entry = name if opened.group(1) else entry
        bodies.setdefault(name, []).append(line)
    return bodies, entry


def with_trips(text: str) -> str:
    """The text with the trips of every loop that counts from zero to a constant.

    >>> text = '''%cond.1 (p: (s32[])) -> pred[] {
    ...   %n = s32[]{:T(128)} constant(24)
    ...   ROOT %lt = pred[] compare(%i, %n), direction=LT
    ... }
    ... ENTRY %main (x: f32[]) -> f32[] {
    ...   %w = (s32[]) while(%t), condition=%cond.1, body=%body.1
    ... }'''
    >>> with_trips(text).splitlines()[5]
    '  %w = (s32[]) while(%t), condition=%cond.1, body=%body.1 /*known_trip_count:{n:24}*/'
    """
    bodies, _ = computations(text)
    lines = []
    for line in text.splitlines():
        loop = re.search(r" while\(.*\bcondition=%?([\w.\-]+)", line)
        if loop and "known_trip_count" not in line:
            inside = "\n".join(bodies.get(loop.group(1), ()))
            counts = re.findall(r"s32\[\]\S* constant\((\d+)\)", inside)
            if len(counts) == 1 and "direction=LT" in inside:
                line += f" /*known_trip_count:{{n:{counts[0]}}}*/"
        lines.append(line)
    return "\n".join(lines)


def once(text: str) -> str:
    """The text without the repetitions of a collective: equal kind, result and channel.

    >>> text = '''%a = f32[8]{0} all-gather(%x), channel_id=3
    ... %b = f32[8]{0:S(1)} all-gather(%y), channel_id=3
    ... %c = f32[8]{0} all-gather(%z), channel_id=4'''
    >>> [line[:2] for line in once(text).splitlines()]
    ['%a', '%c']
    """
    seen, lines = set(), []
    for line in text.splitlines():
        found = re.search(
            rf"= (.*?) ({'|'.join(collectives.KINDS)})(?:-start)?\(.*channel_id=(\d+)", line
        )
        if found:
            key = (
                found.group(2),
                found.group(3),
                tuple(re.findall(r"\w+\[[\d,]*\]", found.group(1))),
            )
            if key in seen:
                continue
            seen.add(key)
        lines.append(line)
    return "\n".join(lines)


def without_refresh(text: str) -> str:
    """The text without the computations that only the branch taken at a refresh reaches.

    `lax.cond` lowers to a conditional whose second branch is taken when the condition holds.
    """
    bodies, entry = computations(text)
    reached: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for line in bodies.get(name, ()):
            found = re.findall(
                r"\b(?:body|condition|to_apply|calls|false_computation)=%?([\w.\-]+)", line
            )
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                listed = re.findall(r"%?([\w.\-]+)", branches)
                found += listed[:1] if len(listed) == 2 else listed
            waiting += found
    return "\n".join(
        line for name, lines in bodies.items() if name in reached or not name for line in lines
    )


def moved(text: str, head: int, vectors: tuple[int, int] = (1, 0)) -> dict[str, Any]:
    """What one chip's collectives give in one update.

    Args:
      text: of the compiled program.
      head: size of the vocabulary, by which embedding and head are known.
      vectors: layers and width, by which the stack of a norm's scales is known.

    Returns:
      "normal": bytes by kind of an update between two refreshes; "with_refresh": with the refresh's
      branch beside the normal one, where the step has branches; "block_reduced_bytes": of "normal",
      sums over replicas of matrices other than embedding and head; "largest": the largest tensors
      of "normal".
    """
    text = once(with_trips(text))
    everything, normal = collectives.read(text), collectives.read(without_refresh(text))
    reduced = [
        one
        for one in normal
        if one.kind in ("all-reduce", "reduce-scatter")
        and len(one.shape) > 1
        and head not in one.shape
        and one.shape[-2:] not in (vectors, (1, vectors[1]))
    ]
    largest = [
        {
            "kind": one.kind,
            "dtype": one.dtype,
            "shape": list(one.shape),
            "times": one.times,
            "bytes": one.bytes,
        }
        for one in normal[:12]
    ]
    return {
        "normal": collectives.by_kind(normal),
        "with_refresh": collectives.by_kind(everything),
        "block_reduced_bytes": sum(one.bytes for one in reduced),
        "largest": largest,
    }
