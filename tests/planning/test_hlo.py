"""What compiled programs move, read from small texts in the forms that XLA writes."""

import pytest

from rlhf.planning import hlo

# As XLA for TPU writes it, cut down: a loop of 24 turns by its condition, a kernel whose config has a
# line that begins with `}`, a reduce-scatter as a fusion, and a loop that ends early.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%scatter (input: bf16[16,8]) -> bf16[4,8] {
  %input = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[16,8]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = bf16[4,8]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={4,8}
}

%layers (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  %w = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %kernel = bf16[4,8]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", backend_config={
} more }
  %gathered = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%kernel), GROUPS, metadata={op_name="jit(step)/mlp"}
  %done = bf16[16,8]{1,0} all-gather-done(%gathered)
  %small = bf16[4,8]{1,0} fusion(%done), kind=kCustom, calls=%scatter, metadata={op_name="transpose"}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%next, %small)
}

%less (q: (s32[], bf16[4,8])) -> pred[] {
  %q = (s32[], bf16[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

%token (r: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %r = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%r), index=0
  %v = bf16[4,8]{1,0} get-tuple-element(%r), index=1
  %moved = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}
  %came = bf16[4,8]{1,0} collective-permute-done(%moved)
  ROOT %u = (s32[], bf16[4,8]{1,0}) tuple(%n, %came)
}

%alive (s: (s32[], bf16[4,8])) -> pred[] {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %most = s32[] constant(512)
  ROOT %any = pred[] fusion(%s), kind=kLoop, calls=%add
}

ENTRY %main (a: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %begin = s32[] copy(%start)
  %tuple = (s32[], bf16[4,8]{1,0}) tuple(%begin, %a)
  %loop = (s32[], bf16[4,8]{1,0}) while(%tuple), condition=%less, body=%layers
  ROOT %decode = (s32[], bf16[4,8]{1,0}) while(%loop), condition=%alive, body=%token
}
"""
TEXT = TEXT.replace("GROUPS", "replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}")
ONE = TEXT.replace("STEP", "1")


def test_loops_multiply_and_those_that_end_early_are_a_token():
    assert hlo.turns(ONE) == {"layers": 24, "token": None}
    # XLA's own loops may count by two.
    assert hlo.turns(TEXT.replace("STEP", "2"))["layers"] == 12
    assert hlo.turns(ONE.replace("constant(0)", "constant(4)"))["layers"] == 20


def test_a_loop_may_say_itself_how_often_it_turns():
    known = ', backend_config={"known_trip_count":{"n":"7"}}'
    text = ONE.replace("body=%layers", f"body=%layers{known}")
    assert hlo.turns(text)["layers"] == 7


def test_collectives_by_kind_bytes_times_and_devices():
    gather, scatter, permute = hlo.collectives(ONE)
    # Of 16 × 8 bfloat16 numbers a device has a quarter already.
    assert (gather.kind, gather.bytes, gather.times) == ("all-gather", 192, 24)
    assert (gather.devices, gather.op_name) == ((0, 2, 4, 6), "jit(step)/mlp")
    # Three others each send the part that is kept.
    assert (scatter.kind, scatter.bytes, scatter.times) == ("reduce-scatter", 192, 24)
    assert (scatter.devices, scatter.op_name) == ((0, 1, 2, 3), "transpose")
    assert (permute.kind, permute.bytes, permute.times) == ("collective-permute", 64, 1)
    assert [one.per_token for one in (gather, scatter, permute)] == [False, False, True]
    assert gather.total == 24 * 192


def test_an_all_reduce_brings_its_array_twice():
    text = ONE.replace("%kernel)", "%w)").replace(
        "%gathered = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w)",
        "%gathered = bf16[16,8]{1,0} all-reduce-start(%w)",
    )
    assert hlo.collectives(text)[0].bytes == 2 * 192


@pytest.mark.parametrize(
    ("devices", "axes"),
    [((0, 1), ("tensor",)), ((0, 2), ("fsdp",)), (range(8), ("data", "fsdp", "tensor"))],
)
def test_a_group_lies_along_axes_of_the_mesh(devices, axes):
    assert hlo.axes_of(tuple(devices), {"data": 2, "fsdp": 2, "tensor": 2}) == axes


def test_traffic_counts_slices_as_slices_and_no_vector_memory():
    text = """
%slice (p: f32[24,8], i: s32[]) -> f32[8] {
  %p = f32[24,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

ENTRY %main (w: f32[24,8], n: s32[]) -> f32[8] {
  %w = f32[24,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[8]{0:S(1)} fusion(%w, %n), kind=kLoop, calls=%slice
  ROOT %two = f32[8]{0} negate(%one)
}
"""
    # The slice and the number are read, and the result is written.
    assert hlo.traffic(text) == (32 + 4 + 32, 0)


def test_traffic_of_a_token_is_of_the_loop_that_ends_early():
    once, token = hlo.traffic(
        ONE.replace("%moved = ", "%twice = bf16[4,8]{1,0} negate(%v)\n  %moved = ")
    )
    assert token == 64 + 64 + hlo.traffic(ONE)[1]
    assert once == hlo.traffic(ONE)[0]


GOES_ON = """HloModule jit_step

%begin (w: bf16[4,8]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  ROOT %first = bf16[16,8]{1,0} all-gather(%w), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%end (v: bf16[4,8]) -> bf16[16,8] {
  %v = bf16[4,8]{1,0} parameter(0)
  ROOT %second = bf16[16,8]{1,0} all-gather(%v), channel_id=CHANNEL, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[4,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %one = bf16[16,8]{1,0} fusion(%a), kind=kOutput, calls=%begin
  ROOT %two = bf16[16,8]{1,0} fusion(%a), kind=kOutput, calls=%end
}
"""


def test_a_collective_that_goes_on_in_several_fusions_is_one():
    assert len(hlo.collectives(GOES_ON.replace("CHANNEL", "7"))) == 1
    assert len(hlo.collectives(GOES_ON.replace("CHANNEL", "8"))) == 2
