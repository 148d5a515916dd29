"""Lines of HLO as the compilers for CPU, GPU and TPU write them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_jax.planning.collectives import Collective, array_shapes, collectives


def entry(*lines):
    return "\n".join(["ENTRY %main (p: f32[4]) -> f32[4] {", *("  " + each for each in lines), "}"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%a = bf16[8,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8]",
            [("all-gather", "bf16", (8, 4), 64, 4)],
        ),
        (
            "%a = f32[2,4]{1,0:T(8,128)} reduce-scatter(%p), replica_groups={{0,1},{2,3}}",
            [("reduce-scatter", "f32", (2, 4), 64, 2)],
        ),
        (
            "%a = (f32[3]{0}, /*index=1*/pred[]) all-reduce(%p, %q), "
            "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}",
            [("all-reduce", "f32", (3,), 12, 4), ("all-reduce", "pred", (), 1, 4)],
        ),
        (
            "%a = (f32[4], f32[8]) all-gather-start(%p), replica_groups=mesh['a'=4] {'a':(1)2}",
            [("all-gather", "f32", (8,), 32, 2)],
        ),
        (
            "%a = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p)",
            [("collective-permute", "f32", (4,), 16, 1)],
        ),
        ("%a = f32[8] all-gather-done(%p)", []),
        (
            "%a = (bf16[2,4], u32[], token[]) send(%p), handler='xla_megascale_runtime'",
            [("between-slices", "bf16", (2, 4), 16, 0)],
        ),
    ],
    ids=["gather", "scatter", "tuple", "started", "permute", "done", "slices"],
)
def test_each_notation_is_read(line, expected):
    found = [dataclasses.astuple(each) for each in collectives(entry(line))]
    assert found == [(*each, False, 1) for each in expected]


def test_what_stands_in_loops_is_repeated_with_them():
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %text = f32[4] custom-call(%p), backend_config={"a":{
}}, metadata={}
  %w = f32[4] while(%p), condition=%other, body=%inner, config={"known_trip_count":{"n":"5"}}
}

%other (p: f32[4]) -> pred[] {
  ROOT %t = pred[] constant(true)
}

%unused (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
}
"""
    assert collectives(text) == [Collective("all-reduce", "f32", (4,), 16, 2, True, 15)]


def test_what_tpu_fuses_is_counted_as_what_it_was():
    text = """
%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {
  %r = f32[8] all-reduce(%p), channel_id=1, replica_groups={{0,1}}
}

%step.1 (p: f32[4]) -> f32[8] {
  %g = f32[8] all-gather(%p), channel_id=2, replica_groups={{0,1}}, attributes={chain_id="0"}
}

%step.2 (p: f32[4]) -> f32[8] {
  %g = f32[8] all-gather(%p), channel_id=2, replica_groups={{0,1}}, attributes={chain_id="0"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[4] fusion(%p), calls=%all-reduce-scatter.1
  %b = f32[8] fusion(%a), calls=%step.1
  %c = f32[8] fusion(%b), calls=%step.2
}
"""
    assert [(each.kind, each.bytes) for each in collectives(text)] == [
        ("reduce-scatter", 32),
        ("all-gather", 32),
    ]


def test_a_compiled_program_is_read():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    split = NamedSharding(mesh, PartitionSpec("x"))
    total = jax.jit(lambda x: x.sum(0), in_shardings=split).lower(jnp.ones((16, 3)))
    text = total.compile().as_text()
    assert text
    (found,) = collectives(text)
    assert found == Collective("all-reduce", "f32", (3,), 12, 8, False, 1)
    assert (2, 3) in array_shapes(text, "f32")
    assert array_shapes(text, "bf16") == set()
