"""What is read off a compiled program's text besides communication."""

import jax
import jax.numpy as jnp

from train.cost.hlo import estimated_cycles, instructions, runs

_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %f = f32[8]{0} fusion(%b), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused (q: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} sine(%q)
}

%dead (q: f32[8]) -> f32[8] {
  ROOT %d = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"1000000"}
}

ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"7"}
  ROOT %w = (s32[], f32[8]) while(%c), condition=%condition, body=%body
}
"""


def test_instructions_are_told_with_the_computation_they_are_in():
    assert [(computation, name) for computation, name, _ in instructions(_PROGRAM)] == [
        ("body", "f"),
        ("condition", "limit"),
        ("condition", "less"),
        ("fused", "s"),
        ("dead", "d"),
        ("main.1", "c"),
        ("main.1", "w"),
    ]


def test_what_a_loop_calls_runs_as_often_as_the_loop():
    times = runs(_PROGRAM)
    assert (times["main.1"], times["body"], times["fused"]) == (1, 5, 5)


def test_cycles_are_summed_as_often_as_they_are_spent_and_code_that_never_runs_takes_none():
    assert estimated_cycles(_PROGRAM) == 7 + 5 * 100


def test_a_program_without_estimates_has_none():
    assert estimated_cycles(jax.jit(jnp.sin).lower(jnp.zeros(8)).compile().as_text()) is None
