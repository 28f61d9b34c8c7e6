"""Random programs of fixed seeds, and by name those that once failed."""

import jax
import numpy as np
import pytest

from tests.laws import programs
from tests.laws.programs import Program

SEEDS, CHUNK = 200, 10

FOUND = {
    "bases from full gradients move after the update, layer by layer": Program(
        stack=(3,), refresh_schedule="after", equality="layerwise"
    ),
}


def assert_agrees(program: Program) -> None:
    outcome = programs.check(program)
    assert not outcome.failed, (
        f"{outcome.ratio:.3g} times the bound {outcome.error}; the smallest program that fails: "
        f"programs.check({programs.shrunk(program)!r})"
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_forms_of_a_random_program_agree(first):
    for seed in range(first, first + CHUNK):
        assert_agrees(programs.draw(seed))


@pytest.mark.parametrize("name", FOUND)
def test_what_failed_once(name):
    outcome = programs.check(FOUND[name])
    assert outcome.smooth
    assert not outcome.failed, outcome


@pytest.mark.slow
def test_seeds_cover_every_value_and_every_equality():
    drawn = [programs.draw(seed) for seed in range(SEEDS)]
    for field, values in programs.CHOICES.items():
        assert {getattr(program, field) for program in drawn} >= set(values), field
    assert {program.equality for program in drawn} >= set(programs.EQUALITIES) - {"eager"}


def test_a_program_is_refused_by_name_or_taken():
    """Where the library takes no program of these slots, `init` raises an expected error."""
    refused = 0
    for seed in range(15):
        for program in programs.candidates(seed):
            message = programs.refusal(program)
            if message is None:
                break
            refused += 1
            assert programs.is_named(message), (program, message)
    assert refused > 5


def test_a_seed_is_the_same_program_everywhere():
    """Its text is the call that makes it."""
    for seed in range(20):
        program = programs.draw(seed)
        assert eval(repr(program), {"Program": Program}) == program == programs.draw(seed)


def test_a_wrong_form_is_noticed_and_shrunk(monkeypatch):
    """A form that is off by one part in a thousand is past the bound, and the program shrinks."""

    def wrong(ref):
        found, state = programs.by_scan(ref)
        wide = len(ref.program.stack) > 0
        move = lambda x: x * (1 + 1e-3 * wide)  # noqa: E731
        return [jax.tree.map(move, params) for params in found], state

    monkeypatch.setitem(programs.EQUALITIES, "scan", (wrong, lambda program: True))
    program = Program(stack=(3,), decay=0.3)
    assert programs.check(program).ratio > 5
    assert programs.shrunk(program) == Program(stack=(3,))


def test_near_a_jump_other_gradients_are_drawn():
    """With a sign of the rest, some of the first gradients have entries within the change."""
    program = Program(residual="sign", stack=(3,), inner="lion")
    ref = programs.reference(program)
    assert ref.smooth
    assert max(ref.bounds) < 1e-3 * np.abs(ref.trajectory[-1]["layers"]["kernel"]).max()
