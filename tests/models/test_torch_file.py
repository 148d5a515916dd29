"""PyTorch's file format without PyTorch: Python's own pickle module is the other party here.

It writes files as torch.save does, with stand-ins for the classes of torch, and it reads what we
wrote. Files of the real torch.save are among the golden ones.
"""

import collections
import contextlib
import functools
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scaling_jax.errors import UserError
from scaling_jax.models import torch_file, torch_pickle

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden" / "openlm"
KINDS = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
DTYPES = [np.dtype(code) for code in KINDS.values()]


@pytest.fixture
def torch(monkeypatch):
    """A package `torch` with nothing in it but what its pickles name."""
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in KINDS:
        setattr(package, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = lambda *arguments: arguments  # noqa: E731
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    package._utils = utils  # pyright: ignore[reportAttributeAccessIssue]
    return package


class Stored:
    """Stands for a storage: the pickler asks for its persistent identity."""

    def __init__(self, key, kind, count):
        self.identity = ("storage", getattr(sys.modules["torch"], kind), key, "cuda:0", count)


class Tensor:
    """Pickled as torch pickles a tensor."""

    def __init__(
        self, storage, offset, shape, strides, rebuild="_rebuild_tensor_v2", hooks=None, rest=()
    ):
        hooks = collections.OrderedDict() if hooks is None else hooks
        self.arguments = (storage, offset, shape, strides, False, hooks, *rest)
        self.rebuild = rebuild

    def __reduce__(self):
        return getattr(sys.modules["torch._utils"], self.rebuild), self.arguments


class Parameter(Tensor):
    def __reduce__(self):
        function = sys.modules["torch._utils"]._rebuild_parameter
        return function, (Tensor(*self.arguments[:4]), True, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, Stored) else None


def pickled(content, protocol=2):
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def write_archive(path, data, storages=(), *, byteorder=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{key}", np.asarray(numbers).tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def tensor(count=4, offset=0, shape=(4,), strides=(1,), key="0", kind="FloatStorage", **more):
    return Tensor(Stored(key, kind, count), offset, shape, strides, **more)


def refusal(path):
    with pytest.raises(UserError) as caught:
        torch_file.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 300
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["tiny", "deep"])
def test_a_file_of_torch_itself_holds_the_weights_that_were_saved(name):
    path = GOLDEN / f"openlm_{name}.pt"
    if not path.is_file():
        pytest.skip(f"the checkpoint that open_lm wrote is not there: {path}")
    content = torch_file.read(path)
    assert content["epoch"] == 1
    assert content["name"] == f"openlm_{name}"
    tensors = {key.removeprefix("module."): part for key, part in content["state_dict"].items()}
    expected = np.load(path.with_suffix(".npz"))
    finals = {key.removeprefix("final/") for key in expected.files if key.startswith("final/")}
    assert finals == {key for key in tensors if not key.endswith("inv_freq")}
    for key in finals:
        assert np.array_equal(tensors[key], expected[f"final/{key}"])


@pytest.mark.parametrize(("kind", "code"), KINDS.items())
def test_each_kind_of_number_is_read(torch, tmp_path, kind, code):
    numbers = np.arange(6).astype(code)
    content = {"w": tensor(6, 0, (2, 3), (3, 1), kind=kind)}
    found = torch_file.read(write_archive(tmp_path / "a.pt", pickled(content), [numbers]))["w"]
    assert found.dtype == numbers.dtype
    assert found.shape == (2, 3)
    assert found.tobytes() == numbers.tobytes()
    assert not found.flags.writeable


def test_views_parameters_and_what_is_beside_them(torch, tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    state = collections.OrderedDict(
        turned=tensor(24, 0, (4, 6), (1, 4)),
        part=tensor(24, 7, (2, 3), (6, 2)),
        scalar=tensor(24, 23, (), ()),
        empty=tensor(24, 0, (0, 5), (5, 1)),
        parameter=Parameter(Stored("0", "FloatStorage", 24), 0, (24,), (1,)),
        flagged=tensor(24, 0, (24,), (1,), rest=({},)),
    )
    vars(state)["_metadata"] = {"": {"version": 1}}  # as a module's state_dict has it
    beside = {
        "epoch": 3, "loss": 0.5, "none": None, "yes": True, "big": -(2**70), "negative": -5,
        "numpy": np.float64(2.5), "count": np.int32(-7), "list": [1, (2, 3), "x"], 5: "five",
        "optimizer": {"state": {0: {"step": tensor(24, 1, (), ())}}, "betas": (0.9, 0.95)},
    }  # fmt: skip
    path = write_archive(tmp_path / "a.pt", pickled({"state_dict": state} | beside), [numbers])
    content = torch_file.read(path)
    found = content.pop("state_dict")
    assert content.pop("optimizer") == {"state": {0: {"step": 1}}, "betas": (0.9, 0.95)}
    del beside["optimizer"]
    assert content == beside
    table = numbers.reshape(6, 4)
    assert np.array_equal(found["turned"], table.T)
    assert np.array_equal(found["part"], [[7, 9, 11], [13, 15, 17]])
    assert found["scalar"] == 23
    assert found["scalar"].shape == ()
    assert found["empty"].shape == (0, 5)
    assert np.array_equal(found["parameter"], numbers)
    assert np.array_equal(found["flagged"], numbers)


contents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(np.uint8, arrays.array_shapes(min_dims=0, min_side=0)).map(
            lambda array: array.astype(dtype)
        )
    ),
    lambda below: st.dictionaries(st.text(st.characters(codec="utf-8")), below, max_size=4),
)


def same(one, other):
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@settings(max_examples=40)
@given(content=st.dictionaries(st.text(st.characters(codec="utf-8")), contents, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("file") / "some name.pt"
    torch_file.write(path, content)
    assert same(torch_file.read(path), content)


def test_python_unpickles_what_is_written_to_what_torch_expects(torch, tmp_path):
    weight = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    path = tmp_path / "model.pt"
    torch_file.write(path, {"epoch": 300, "a": {"w": weight.T, "b": np.array([7], np.float32)}})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("model/version") == b"3\n"
        assert archive.read("model/byteorder") == b"little"
        assert archive.read("model/data/0") == weight.T.tobytes()
        unpickler = pickle.Unpickler(archive.open("model/data.pkl"))
        unpickler.persistent_load = lambda identity: identity
        content = unpickler.load()
        for entry in archive.infolist():
            header = path.read_bytes()[entry.header_offset :][:30]
            start = entry.header_offset + 30 + sum(struct.unpack("<26xHH", header))
            assert start % 64 == 0
    bfloat16 = ("storage", torch.BFloat16Storage, "0", "cpu", 6)
    float32 = ("storage", torch.FloatStorage, "1", "cpu", 1)
    assert content == {
        "epoch": 300,
        "a": {
            "w": (bfloat16, 0, (3, 2), (2, 1), False, collections.OrderedDict()),
            "b": (float32, 0, (1,), (1,), False, collections.OrderedDict()),
        },
    }


def test_only_plain_content_is_written(tmp_path):
    for wrong in ({1, 2}, np.ones(2, complex), np.array(["text"]), object()):
        with pytest.raises(TypeError):
            torch_file.write(tmp_path / "a.pt", {"a": wrong})
    assert list(tmp_path.iterdir()) == []


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def python_attacks(marker):
    """Pickles for which Python makes the file `marker`."""
    command = f"touch {marker}"
    system = Call(os.system, command)
    return {
        "os.system": pickled(system),
        "in a state dict": pickled({"state_dict": collections.OrderedDict(w=system)}),
        "in the hooks of a tensor": pickled([tensor(hooks=system)]),
        "eval": pickled(Call(eval, f"open({str(marker)!r}, 'w')")),
        "exec": pickled({"epoch": [Call(exec, f"open({str(marker)!r}, 'w')")]}),
        "partial": pickled(Call(functools.partial(os.system, command))),
        "stack global": pickled(system, protocol=4),
        "instance": b"(" + text(command) + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + text(command) + b"o.",
        "unused": b"\x80\x02cos\nsystem\n" + text(command) + b"\x85R0}.",
    }


def other_attacks(word):
    """Pickles that go for other holes of an unpickler."""
    return {
        "a name alone": b"\x80\x02cos\nsystem\n.",
        "dots in a name": b"\x80\x02ctorch\n_utils.os.system\n" + word + b"\x85R.",
        "names by stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "a loader of torch": b"\x80\x02ctorch\nload\n" + word + b"\x85R.",
        "an importer of torch": b"\x80\x02ctorch._utils\n_import_dotted_name\n.",
        "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "copyreg": b"\x80\x02ccopyreg\n_reconstructor\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n" + word + b"\x85R.",
        "a call of a text": b"\x80\x02" + word + word + b"\x85R.",
        "a call without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "a dictionary of pairs": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "attributes of a name": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        "attributes of a number": b"\x80\x02K\x01}b.",
        "another codec": b"\x80\x02c_codecs\nencode\n" + word + text("rot13") + b"\x86R.",
        "a dtype of objects": b"\x80\x02cnumpy\ndtype\n" + text("O8") + b"\x85R.",
        "an array of NumPy": pickled({"w": np.ones(3)}),
        "a persistent name": b"Pos.system\n.",
        "a persistent text": b"\x80\x02" + word + b"Q.",
        "a storage of no kind": b"\x80\x02(" + text("storage") + word * 3 + b"K\x01tQ.",
        "a key that is a tuple": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        "a key that is a list": b"\x80\x02}]Ns.",
        "entries of a text": b"\x80\x02" + word + b"NNs.",
        "a mark below": b"\x80\x02}(0.",
        "an empty stack": b"\x80\x02.",
        "half a pair": b"\x80\x02}(Nu.",
        "an unmade reference": b"\x80\x02h\x05.",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "a text that is cut off": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "no dictionary": pickled([1]),
    }


def text(content):
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content.encode()


def test_a_pickle_that_asks_for_more_than_tensors_is_refused(torch, tmp_path):
    marker = tmp_path / "marker"
    attacks = python_attacks(marker)
    for name, data in attacks.items():
        unpickler = pickle.Unpickler(io.BytesIO(data))
        unpickler.persistent_load = lambda identity: identity
        unpickler.load()
        assert marker.exists(), f"{name} is no attack"
        marker.unlink()
    for name, data in (attacks | other_attacks(text(f"touch {marker}"))).items():
        path = write_archive(tmp_path / "evil.pt", data, [np.ones(4, np.float32)])
        assert refusal(path), name
        assert not marker.exists(), name


@pytest.mark.parametrize(
    "described",
    [
        {"offset": 1},
        {"offset": 2**63},
        {"offset": -1},
        {"shape": (5,)},
        {"shape": (2, 2), "strides": (3, 1)},
        {"shape": (2, 2), "strides": (2**62, 1)},
        {"shape": (2, 2), "strides": (-1, 1)},
        {"shape": (-4,)},
        {"shape": (True,)},
        {"shape": (2.0,)},
        {"shape": (4, 1)},
        {"shape": [4], "strides": [1]},
        {"shape": (2**40,), "strides": (0,)},
        {"shape": (2**62, 2**62), "strides": (0, 0)},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"count": 5},
        {"count": 3, "shape": (3,)},
        {"count": -1},
        {"count": 2**61, "shape": (2**61,)},
        {"kind": "DoubleStorage"},
        {"key": "1"},
        {"key": "../../etc/passwd"},
        {"key": "0/../0"},
        {"key": "/0"},
        {"key": "\u0660"},
        {"key": ""},
        {"rest": ({"neg": True},)},
        {"rest": ({}, {})},
        {"rebuild": "_rebuild_parameter"},
    ],
    ids=str,
)
def test_a_tensor_beyond_its_storage_or_of_unknown_form_is_refused(torch, tmp_path, described):
    path = write_archive(
        tmp_path / "a.pt", pickled({"w": tensor(**described)}), [np.ones(4, np.float32)]
    )
    assert refusal(path).startswith("refused: ")


def test_archives_that_torch_does_not_write_are_refused(torch, tmp_path):
    data, numbers, path = pickled({"w": tensor()}), np.ones(4, np.float32), tmp_path / "a.pt"
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "no such file" in refusal(tmp_path)
    write_archive(path, data, [numbers], compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    write_archive(path, data, [numbers], byteorder=b"big")
    assert "big-endian" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    assert "not one that torch.save writes" in refusal(path)
    write_archive(path, data, [numbers])
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", data)
    assert "not one that torch.save writes" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../data.pkl", data)
        archive.writestr("../../data/0", numbers.tobytes())
    assert "data/0 is missing" in refusal(path)


def test_other_formats_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickled(1001))
    assert "before PyTorch 1.6" in refusal(path)
    assert "save it again" in refusal(path)
    path.write_bytes(pickled(Call(os.system, f"touch {tmp_path / 'marker'}")))
    assert "bare pickle" in refusal(path)
    for other in (b"", b"weights", b"\x93NUMPY"):
        path.write_bytes(other)
        assert "not a file of torch.save" in refusal(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_byte_or_a_cut_is_noticed_or_does_not_matter(tmp_path):
    path = tmp_path / "a.pt"
    content = {"epoch": 1, "w": np.arange(5, dtype=np.float32), "v": np.arange(3)}
    torch_file.write(path, content)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert same(torch_file.read(path), content), place
        except UserError:
            noticed += 1
    assert noticed > len(whole) // 3
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        refusal(path)


@given(data=st.binary(max_size=80), start=st.sampled_from([b"", b"\x80\x02}("]))
def test_any_bytes_are_data_or_a_value_error(data, start):
    with contextlib.suppress(ValueError):
        torch_pickle.loads(start + data, lambda view: np.empty(view.shape))
