"""Kernels of programs for GPUs, against small programs that were counted by hand."""

import pytest

from train.cost.kernels import kernels


def _program(*instructions, before=""):
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"HloModule jit_step, is_scheduled=true\n\n{before}ENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


_CUBLAS = (
    '%gemm = (bf16[4,6]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
    'backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"BIAS"},'
    '"reification_cost":[{"exec_time_us":6.16,"name":"sol"}]}'
)
_A_B = ("%a = bf16[4,8]{1,0} parameter(0)", "%b = bf16[8,6]{1,0} parameter(1)")


def test_a_product_reads_its_operands_writes_its_result_and_not_its_workspace():
    (gemm,) = kernels(_program(*_A_B, _CUBLAS, "ROOT %r = bf16[4,6]{1,0} get-tuple-element(%gemm), index=0"))
    assert (gemm.name, gemm.kind, gemm.times, gemm.dtype) == ("gemm", "__cublas$lt$matmul", 1, "bf16")
    assert gemm.read == 2 * (4 * 8 + 8 * 6)
    assert gemm.written == 2 * 4 * 6
    assert gemm.flops == 2 * 4 * 6 * 8
    assert gemm.estimates == {"sol": 6.16}
    assert gemm.is_product


_FUSED = """\
%fused (p.0: f32[100], p.1: f32[10], p.2: s32[]) -> f32[10] {
  %p.0 = f32[100]{0} parameter(0)
  %p.2 = s32[] parameter(2)
  %slice = f32[10]{0} dynamic-slice(%p.0, %p.2), dynamic_slice_sizes={10}
  %p.1 = f32[10]{0} parameter(1)
  ROOT %sum = f32[10]{0} add(%slice, %p.1)
}

"""


def test_of_what_is_only_sliced_the_slice_is_read():
    (fusion,) = kernels(
        _program(
            "%x = f32[100]{0} parameter(0)",
            "%y = f32[10]{0} parameter(1)",
            "%i = s32[] parameter(2)",
            "ROOT %f = f32[10]{0} fusion(%x, %y, %i), kind=kLoop, calls=%fused",
            before=_FUSED,
        )
    )
    assert (fusion.kind, fusion.flops) == ("kLoop", 0)
    assert fusion.read == 4 * 10 + 4 * 10 + 4  # the slice, the other operand, and where it begins
    assert fusion.written == 4 * 10


def test_an_update_in_place_reads_and_writes_the_part_only():
    update = """\
%fused (p.0: f32[100], p.1: f32[10]) -> f32[100] {
  %p.0 = f32[100]{0} parameter(0)
  %p.1 = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %u = f32[100]{0} dynamic-update-slice(%p.0, %p.1, %zero)
}

"""
    (fusion,) = kernels(
        _program(
            "%x = f32[100]{0} parameter(0)",
            "%y = f32[10]{0} parameter(1)",
            "ROOT %f = f32[100]{0} fusion(%x, %y), kind=kLoop, calls=%fused",
            before=update,
        )
    )
    assert (fusion.read, fusion.written) == (4 * 10, 4 * 10)


@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
def test_fused_attention_is_two_products_and_its_gradient_five(target, products):
    (call,) = kernels(
        _program(
            "%q = bf16[2,5,3,4]{3,2,1,0} parameter(0)",
            "%k = bf16[2,7,3,4]{3,2,1,0} parameter(1)",
            "%v = bf16[2,7,3,4]{3,2,1,0} parameter(2)",
            f'%a = (bf16[2,3,5,4]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), custom_call_target="{target}"',
        )
    )
    assert call.is_fused_attention
    assert call.flops == products * 2 * (2 * 3) * 5 * 7 * 4  # heads of all images, queries, keys, width
    assert call.read == 2 * (2 * 5 * 3 * 4 + 2 * 2 * 7 * 3 * 4)


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("__cudnn$convBiasActivationForward", ("bf16[2,8,8,3]", "bf16[6,4,4,3]"), "bf16[2,2,2,6]"),
        ("__cudnn$convBackwardFilter", ("bf16[2,8,8,3]", "bf16[2,2,2,6]"), "bf16[6,4,4,3]"),
        ("__cudnn$convBackwardInput", ("bf16[2,2,2,6]", "bf16[6,4,4,3]"), "bf16[2,8,8,3]"),
    ],
)
def test_a_convolution_and_its_gradients_are_as_many_flops(target, operands, result):
    (call,) = kernels(
        _program(
            *(f"%x.{i} = {shape} parameter({i})" for i, shape in enumerate(operands)),
            f"%c = ({result}, u8[0]) custom-call(%x.0, %x.1), window={{size=4x4 stride=4x4}}, "
            f'dim_labels=b01f_o01i->b01f, custom_call_target="{target}"',
        )
    )
    assert call.flops == 2 * (2 * 2 * 2 * 6) * (4 * 4 * 3)


def test_a_product_of_tritons_is_found_inside_its_fusion():
    fused = """\
%gemm_computation (p.0: f32[4,8], p.1: f32[8,6]) -> f32[4,6] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = f32[8,6]{1,0} parameter(1)
  ROOT %d = f32[4,6]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""
    (fusion,) = kernels(
        _program(
            "%x = f32[4,8]{1,0} parameter(0)",
            "%y = f32[8,6]{1,0} parameter(1)",
            "ROOT %f = f32[4,6]{1,0} fusion(%x, %y), kind=kCustom, calls=%gemm_computation, "
            'backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}',
            before=fused,
        )
    )
    assert (fusion.kind, fusion.flops, fusion.dtype) == ("__triton_gemm", 2 * 4 * 6 * 8, "f32")


def test_loops_count_as_often_as_they_run_and_of_a_choice_the_longer_branch():
    before = """\
%short (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} copy(%q)
}

%long (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %l.1 = f32[8]{0} copy(%q)
  ROOT %l.2 = f32[8]{0} copy(%l.1)
}

%body (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} conditional(%i, %b, %b), branch_computations={%short, %long}
}

"""
    found = kernels(
        _program(
            "%p = f32[8]{0} parameter(0)",
            "ROOT %w = f32[8]{0} while(%p), condition=%condition, body=%body, "
            'backend_config={"known_trip_count":{"n":"5"}}',
            before=before,
        )
    )
    assert [(kernel.name, kernel.times, kernel.read, kernel.written) for kernel in found] == [
        ("l.1", 5, 32, 32),
        ("l.2", 5, 32, 32),
    ]


def test_what_runs_asynchronously_counts_once():
    wrapped = "%wrapped (q: f32[8]) -> f32[8] {\n  %q = f32[8]{0} parameter(0)\n  ROOT %c = f32[8]{0} copy(%q)\n}\n\n"
    found = kernels(
        _program(
            "%p = f32[8]{0} parameter(0)",
            "%start = ((f32[8]), f32[8], u32[]) async-start(%p), calls=%wrapped",
            "ROOT %done = f32[8]{0} async-done(%start), calls=%wrapped",
            before=wrapped,
        )
    )
    assert [kernel.name for kernel in found] == ["c"]


def test_a_kernel_is_placed_in_the_innermost_function_of_this_project():
    tables = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/crossvit_jax/kernels/layers.py"
2 "/site-packages/flax/nnx/nn/linear.py"

FunctionNames
1 "gelu"
2 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=8 end_line=8 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=1}

"""
    program = _program(
        "%p = f32[8]{0} parameter(0)",
        "%inside = f32[8]{0} copy(%p), metadata={stack_frame_id=2}",
        "ROOT %outside = f32[8]{0} copy(%inside), metadata={stack_frame_id=3}",
    ).partition("\n\n")[2]
    assert [kernel.place for kernel in kernels(tables + program)] == ["layers.py:gelu", ""]
