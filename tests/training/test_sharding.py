"""What devices send to each other in a training step, read from the compiled program."""

import collections
import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.models import counting, head
from scaling_jax.planning.collectives import array_shapes, collectives
from scaling_jax.training import state, step

pytestmark = pytest.mark.usefixtures("quick_compilation")

# More layers than any platform writes out.
BATCH, LENGTH, WIDTH, HIDDEN, VOCABULARY, LAYERS = 16, 64, 64, 256, 2048, 9
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "fsdp_tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "slices": MeshConfig(slices=2, data=1, fsdp=4),
}
QUICK = ("fsdp_tensor",)
PARTIAL_LOGITS = 4 * VOCABULARY * 32


@pytest.fixture(scope="module")
def model():
    return ModelConfig(
        width=WIDTH,
        layers=LAYERS,
        heads=4,
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
    )


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES
    ],
)
def mesh(request):
    return meshes.make_mesh(MESHES[request.param])


@pytest.fixture(scope="module")
def program(model, mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MOST_LOGITS", PARTIAL_LOGITS)
        return step.lower(model, BATCH, 1, mesh).compile()


@pytest.fixture(scope="module")
def text(program):
    return program.as_text()


@pytest.fixture(scope="module")
def sent(text):
    """The collectives of more than a number."""
    return [each for each in collectives(text) if each.shape]


def per_device(model, mesh):
    """The matrices of a layer and the two of the vocabulary, put together along `fsdp` only."""
    layout = state.abstract(model, mesh)["params"]
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(layout):
        if path[-1].key != "gain":
            held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh.shape["fsdp"]
            sizes[path[-1].key] = held // (LAYERS if path[0].key == "blocks" else 1)
    return sizes


def test_every_parameter_is_gathered_once_in_each_pass_and_nothing_else_is(model, mesh, sent):
    """The optimiser's moments and the rows' vectors stay where they are."""
    found = collections.Counter(
        (math.prod(each.shape), each.devices, each.repeats)
        for each in sent
        # Gradients of the gains of query and key are gathered over `tensor`: a few numbers.
        if each.kind == "all-gather" and each.shape != (WIDTH,)
    )
    expected = collections.Counter()
    if mesh.shape["fsdp"] > 1:
        for name, size in per_device(model, mesh).items():
            once = name in ("embedding", "output")
            repeats, times = (1, 1) if once else (LAYERS, 2)
            expected[size, mesh.shape["fsdp"], repeats] += times
    assert found == expected
    assert {each.kind for each in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_every_gradient_is_added_up_once_over_the_rows_in_float32(model, mesh, sent):
    """Within a slice all of it; between slices only what a device keeps."""
    reduced = [each for each in sent if each.kind != "all-gather"]
    assert {each.dtype for each in reduced} == {"f32"}
    # Over `tensor` only vectors of rows are.
    gradients = [each for each in reduced if not each.devices == mesh.shape["tensor"] > 1]
    sizes = per_device(model, mesh)
    matrices = sum(
        size * (1 if name in ("embedding", "output") else LAYERS) for name, size in sizes.items()
    )
    gains = counting.actual_params(model) - sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(state.abstract(model, mesh)["params"])
        if path[-1].key != "gain"
    )
    first, rest = [], []
    for each in gradients:
        (rest if each.devices == mesh.shape["slice"] > 1 else first).append(each)
    sums = [sum(each.bytes * each.repeats for each in part) for part in (first, rest)]
    assert 4 * matrices <= sums[0] <= 4 * (matrices + 2 * gains)
    assert sums[1] == (4 * matrices // mesh.shape["fsdp"] if mesh.shape["slice"] > 1 else 0)


def test_the_state_lies_as_the_table_says_before_and_after(model, mesh, program):
    layout = state.abstract(model, mesh)
    for found in (program.input_shardings[0][0], program.output_shardings[0]):
        for leaf, where in zip(*map(jax.tree.leaves, (layout, found)), strict=True):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(layout)
    )
    rows = BATCH // meshes.batch_parts(mesh) * (LENGTH + 1) * 4
    arguments = program.memory_analysis().argument_size_in_bytes
    assert held + rows <= arguments < held + rows + 1024


def test_no_device_ever_has_the_logits_of_its_rows(mesh, text):
    tensor = mesh.shape["tensor"]
    found = [shape for shape in array_shapes(text, "f32") if shape[-1:] == (VOCABULARY // tensor,)]
    rows = BATCH * LENGTH // meshes.batch_parts(mesh)
    # The output matrix itself is the largest.
    assert max(math.prod(shape[:-1]) for shape in found) <= WIDTH < rows


@pytest.fixture
def nothing_kept():
    """What is compiled is compiled: what is kept has no trace of how it was made."""
    reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.mark.usefixtures("nothing_kept")
def test_gradients_of_bfloat16_products_are_added_up_in_float32(model, tmp_path):
    """As the partitioner leaves them: later XLA for CPU makes float32 of all bfloat16."""
    mesh = meshes.make_mesh(MESHES["slices"])
    lowered = step.lower(dataclasses.replace(model, compute_dtype="bfloat16"), BATCH, 1, mesh)
    lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (dump,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    types = collections.defaultdict(set)
    for each in collectives(dump.read_text()):
        types["gather" if each.kind == "all-gather" else "add up"].add(each.dtype)
    assert types == {"gather": {"bf16"}, "add up": {"f32"}}


@pytest.mark.slow
def test_sequences_of_8192_positions_need_no_square_of_scores():
    model = ModelConfig(
        width=16, layers=1, heads=2, vocabulary_size=64, sequence_length=8192, remat="block"
    )
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    program = step.lower(model, 1, 1, mesh).compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory
    assert text
    square = model.heads * 8192**2 * 4
    assert memory.temp_size_in_bytes < square / 2
    largest = max(np.prod(shape) for shape in array_shapes(text, "f32"))
    assert 4 * largest <= square / 16


@pytest.mark.slow
def test_the_step_compiles_for_tpu_with_splash_attention(monkeypatch):
    """For four chips that are not here: what is gathered is bfloat16, what is added up float32."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU, is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    model = ModelConfig(
        width=256,
        layers=6,
        heads=2,
        vocabulary_size=2048,
        sequence_length=512,
        compute_dtype="bfloat16",
        remat="dots",
    )
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=4), chips)
    text = step.lower(model, 8, 1, mesh).compile().as_text()
    assert text
    assert "splash" in text
    assert not any(shape[-2:] == (512, 512) for shape in array_shapes(text, "f32"))
    sent = [each for each in collectives(text) if each.shape]
    gathers = [each for each in sent if each.kind == "all-gather"]
    assert {each.dtype for each in gathers} == {"bf16"}
    assert sorted(each.shape[1:] for each in gathers if each.in_loop) == sorted(
        2 * [(256, 3, 256), (256, 256), (256, 2, 768), (768, 256)]
    )
    sums = [each for each in sent if each.kind != "all-gather"]
    assert {each.dtype for each in sums} == {"f32"}
    assert {each.kind for each in sums} <= {"reduce-scatter", "all-reduce"}
