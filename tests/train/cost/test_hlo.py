"""What is read off a compiled program's text: what runs how often, and what devices tell each other."""

import jax
import jax.numpy as jnp
import pytest

from train.cost.hlo import Traffic, communication, early_reductions, estimated_cycles, instructions, own_kernels, runs

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


# --- communication ---

_HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"


def _program(*instructions, before=""):
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"{_HEADER}{before}ENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


@pytest.mark.parametrize(
    ("instruction", "kind", "volume", "share"),
    [
        ("%a = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8]", "all-reduce", 128, 2 * 7 / 8),
        ("%a = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}", "all-reduce", 128, 1),
        ("%a = f32[8,4]{1,0} all-reduce(%x), replica_groups={}", "all-reduce", 128, 2 * 7 / 8),
        ("%a = bf16[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0)", "all-gather", 64, 3 / 4),
        ("%a = s8[2] reduce-scatter(%x), channel_id=3, replica_groups=[2,4]<=[8]", "reduce-scatter", 8, 3 / 4),
        ("%a = (u4[3], pred[5]) all-to-all(%x, %y), replica_groups=[1,8]<=[8]", "all-to-all", 7, 7 / 8),
        ("%a = f8e4m3fn[6] collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 6, 1),
        (
            "%a = f32[] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add",
            "all-reduce",
            4,
            2 * 3 / 4,
        ),
        (
            "%a = f32[4]{0:T(256)(128)(2,1)S(1)} all-gather(%x), replica_groups=mesh['a'=1,'b'=2,'c'=4], "
            "device_ids=([4,2]T(1,0)) {'a','c'}",
            "all-gather",
            16,
            3 / 4,
        ),
        ("%a = f32[] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)4}", "all-reduce", 4, 2 * 3 / 4),
    ],
)
def test_volume_and_share_sent_of_every_kind_and_notation(instruction, kind, volume, share):
    assert communication(_program(instruction)) == {kind: Traffic(calls=1, volume=volume, sent=volume * share)}


def test_what_is_started_and_done_later_counts_once_with_the_results_shape():
    program = _program(
        "%all-gather-start = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8]",
        "%all-gather-done = f32[32]{0} all-gather-done(%all-gather-start)",
        "%cps.1 = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), channel_id=2, "
        "source_target_pairs={{0,1}}",
        "ROOT %cpd.1 = f32[8]{0} collective-permute-done((f32[8], f32[8], u32[], u32[]) %cps.1)",
    )
    traffic = communication(program)
    assert traffic["all-gather"] == Traffic(calls=1, volume=128, sent=128 * 7 / 8)
    assert traffic["collective-permute"] == Traffic(calls=1, volume=32, sent=32)


def test_an_operation_wrapped_to_run_asynchronously_counts_once():
    wrapped = """\
%wrapped (q: f32[16]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

"""
    program = _program(
        "%start = ((f32[16]), f32[2], u32[]) async-start(%p), calls=%wrapped",
        "ROOT %done = f32[2]{0} async-done(%start), calls=%wrapped",
        before=wrapped,
    )
    assert communication(program) == {"reduce-scatter": Traffic(calls=1, volume=64, sent=56)}


def test_kernels_of_our_own_count_as_often_as_they_run():
    call = '(bf16[8]{0}) custom-call(%p), custom_call_target="tpu_custom_call", backend_config={}'
    body = f"%body (q: bf16[8]) -> bf16[8] {{\n  %kernel.1 = {call}\n}}\n\n"
    loop = """%w = bf16[8] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}"""
    assert own_kernels(_program(f"%kernel.2 = {call}", loop, before=body)) == 4
    assert own_kernels(_program('%f.1 = bf16[8] custom-call(%p), custom_call_target="Sharding"')) == 0


def test_a_tpus_fusions_that_work_on_the_same_operation_count_once():
    fusions = "".join(
        f"%fused.{i} (q: bf16[16]) -> bf16[32] {{\n"
        f"  ROOT %all-gather.{i} = bf16[32]{{0}} all-gather(%q), channel_id=7, replica_groups=[4,2]<=[8]\n}}\n\n"
        for i in range(3)
    )
    program = _program(*(f"%f.{i} = bf16[32] fusion(%p), calls=%fused.{i}" for i in range(3)), before=fusions)
    assert communication(program) == {"all-gather": Traffic(calls=1, volume=64, sent=32)}


def test_an_all_reduce_that_a_tpu_cuts_up_at_once_is_a_reduce_scatter():
    fusion = """\
%all-reduce-scatter.7 (q: bf16[32]) -> bf16[16] {
  %all-reduce.1 = bf16[32]{0} all-reduce(%q), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %cut = bf16[16]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={16}
}

"""
    program = _program("%f = bf16[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7", before=fusion)
    assert communication(program) == {"reduce-scatter": Traffic(calls=1, volume=64, sent=32)}


@pytest.mark.parametrize("known", [True, False])
def test_a_loop_counts_as_often_as_it_runs(known):
    loop = """\
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %ar = f32[8]{0} all-reduce(%b), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

"""
    trips = ', backend_config={"known_trip_count":{"n":"5"}}' if known else ""
    program = _program(f"%w = (s32[], f32[8]) while(%p), condition=%condition, body=%body{trips}", before=loop)
    assert communication(program) == {"all-reduce": Traffic(calls=5, volume=160, sent=160)}


def test_operations_of_one_device_alone_and_code_that_never_runs_are_none():
    unused = "%dead (q: f32[8]) -> f32[8] {\n  ROOT %a = f32[8] all-reduce(%q), replica_groups=[1,8]<=[8]\n}\n\n"
    program = _program("%a = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[8,1]<=[8]", before=unused)
    assert sum(traffic.volume for traffic in communication(program).values()) == 0


def test_a_program_for_one_device_tells_nobody_anything():
    assert communication(jax.jit(jnp.sin).lower(jnp.zeros(8)).compile().as_text()) == {}


# --- reductions beside the backward pass ---


def test_reductions_are_early_that_start_before_the_last_gradient_is_computed():
    wrapped = """\
%wrapped (q: f32[16]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

"""
    gradient = (
        'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/transpose(jvp(loss))/dot_general"}'
    )
    unpacking = 'kind=kLoop, calls=%slice, metadata={op_name="jit(step)/transpose(jvp(loss))/transpose"}'
    program = _program(
        "%count = s32[] all-reduce(%n), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add",
        f"%g.1 = f32[16]{{0}} custom-call(%p), {gradient}",
        "%start = ((f32[16]), f32[2], u32[]) async-start(%g.1), calls=%wrapped",
        "%ar.1 = f32[8] all-reduce-start(%g.1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add",
        f"%g.2 = f32[16]{{0}} custom-call(%p), {gradient}",
        "%done = f32[2]{0} async-done(%start), calls=%wrapped",
        "%ar.2 = f32[8] all-reduce-done(%ar.1)",
        "%ar.3 = f32[8] all-reduce(%g.2), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add",
        f"ROOT %slice.1 = f32[8]{{0}} fusion(%ar.3), {unpacking}",
        before=wrapped,
    )
    assert early_reductions(program) == (2, 3)


def test_a_program_without_reductions_starts_none():
    assert early_reductions(_program("ROOT %c = f32[8]{0} copy(%p)")) is None
