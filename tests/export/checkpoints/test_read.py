"""Reading by bytes: every form of a file, no code run, and one clear error for what is hostile or damaged."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokexport.export.checkpoints.read import read_file
from tokexport.export.checkpoints.stand_ins import Inert, unpickle
from tokexport.export.checkpoints.torch_file import DamagedError, StoredTensor

from tokexport import UsageError, load_model

STATE = {
    "float": torch.randn(3, 4),
    "half": torch.randn(2, 2).half(),
    "bfloat": torch.randn(5).bfloat16(),
    "long": torch.arange(6).reshape(2, 3),
    "bool": torch.tensor([True, False]),
    "turned": torch.randn(4, 3).T,
    "empty": torch.zeros(0, 3),
    "number": torch.tensor(2.0),
    "parameter": torch.nn.Parameter(torch.randn(2)),
}
SHARED = torch.randn(10)
STATE |= {"part": SHARED[2:6], "strided": SHARED[::3], "repeated": torch.randn(1, 3).expand(4, 3)}


def loaded(data):
    return {k: v.load() for k, v in data.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_give_what_torch_gives(zipped, tmp_path):
    torch.save(STATE, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    file = read_file(tmp_path / "x")
    assert file.kind == "torch" and all(isinstance(v, StoredTensor) for v in file.data.values())
    assert {k: v.shape for k, v in file.data.items()} == {k: tuple(v.shape) for k, v in STATE.items()}
    for key, value in loaded(file.data).items():
        assert value.dtype == STATE[key].dtype and torch.equal(value, STATE[key]) and value.is_contiguous(), key


def test_tensors_are_read_only_when_they_are_asked_for(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.ones(3)}, "optimizer": {"b": torch.zeros(10**6)}}, tmp_path / "x")
    read = []
    monkeypatch.setattr(torch, "empty", lambda *a, real=torch.empty, **k: read.append(a) or real(*a, **k))
    data = read_file(tmp_path / "x").data
    assert not read
    assert data["model"]["a"].load().sum() == 3 and read == [(12,)]


def test_most_significant_byte_first(tmp_path):
    torch.save({"a": torch.arange(5.0)}, tmp_path / "little")
    with zipfile.ZipFile(tmp_path / "little") as old, zipfile.ZipFile(tmp_path / "big", "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("byteorder"):
                content = b"big"
            if member.filename.endswith("data/0"):
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            new.writestr(member.filename, content)
    assert torch.equal(read_file(tmp_path / "big").data["a"].load(), torch.arange(5.0))


def old_tar(path, tensors):
    """A file as torch.save wrote it before 0.1.10: storages, tensors and a pickle that refers to them."""
    storages, views, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(tensors), storages, 2)
    pickle.dump(len(tensors), views, 2)
    for i, value in enumerate(tensors.values()):
        pickle.dump((i, "cpu", torch.FloatStorage), storages, 2)
        storages.write(struct.pack("<q", value.numel()) + value.numpy().tobytes())
        pickle.dump((100 + i, i, torch.FloatTensor), views, 2)
        views.write(struct.pack("<i", value.ndim) + b"\0" * 4 + struct.pack(f"<{value.ndim}q", *value.shape))
        views.write(struct.pack(f"<{value.ndim}q", *value.stride()) + struct.pack("<q", 0))
    pickle.dump([], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return (
                100 + next(i for i, t in enumerate(tensors.values()) if t is value) if torch.is_tensor(value) else None
            )

    Pickler(pickled, 2).dump({"model": dict(tensors), "epoch": 3})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, stream in (("storages", storages), ("tensors", views), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))


def test_the_old_tar_gives_what_torch_gives(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    old_tar(tmp_path / "x.pth", tensors)
    theirs = torch.load(tmp_path / "x.pth", weights_only=False)["model"]
    ours = loaded(read_file(tmp_path / "x.pth").data["model"])
    assert all(torch.equal(ours[k], theirs[k]) and torch.equal(ours[k], tensors[k]) for k in tensors)


def test_npz_and_safetensors_under_any_name(tmp_path):
    np.savez(tmp_path / "a", x=np.arange(4.0).reshape(2, 2))
    np.savez_compressed(tmp_path / "b.npz", x=np.arange(4.0).reshape(2, 2))
    os.replace(tmp_path / "a.npz", tmp_path / "a.pth")
    for name in ("a.pth", "b.npz"):
        file = read_file(tmp_path / name)
        assert file.kind == "npz" and file.data["x"].load().tolist() == [[0, 1], [2, 3]]
    save_file({"x": torch.ones(2)}, tmp_path / "c")
    assert read_file(tmp_path / "c").kind == "safetensors" and loaded(read_file(tmp_path / "c").data)["x"].tolist() == [
        1,
        1,
    ]


# Safetensors headers of any length: the first byte of one is not taken for another kind of file.
@pytest.mark.parametrize("length", [0x80, 0x100 + ord("<"), 0x1F08 - 0x1F00 + 0x100, 0x400])
def test_the_length_of_a_header_is_no_other_files_first_byte(length, tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + header.ljust(length) + struct.pack("<f", 7))
    assert read_file(tmp_path / "x").data["x"].load().item() == 7


# Code.


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GLOBALS = [
    b"posix\nsystem",
    b"builtins\neval",
    b"builtins\nexec",
    b"torch.hub\nload",
    b"os\nmkdir",
    b"torch\nload",
    b"builtins\ngetattr",
]


@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_global_of_a_pickle_is_looked_up(name, protocol, tmp_path):
    target = str(tmp_path / "ran").encode()
    if protocol == 4:
        module, attribute = name.split(b"\n")
        text = lambda b: b"\x8c" + bytes([len(b)]) + b
        data = b"\x80\x04" + text(module) + text(attribute) + b"\x93" + text(target) + b"\x85R."
    else:
        data = b"c" + name + b"\n(V" + target + b"\ntR."
    assert isinstance(unpickle(io.BytesIO(data)), Inert) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "build",
    [b"ctorch._utils\n_rebuild_tensor_v2\n}b.", b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\0\0\0call)s\x86b."],
)
def test_what_is_understood_cannot_be_changed(build):
    with pytest.raises(pickle.UnpicklingError, match="changes a function"):
        unpickle(io.BytesIO(build))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 2**56 bytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2**63
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02" + b"(" * 10**5 + b"l" * 10**5,
        b"\x80\x02.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"",
    ],
)
def test_a_hostile_pickle_fails_at_once(data):
    with pytest.raises(pickle.UnpicklingError):
        unpickle(io.BytesIO(data))


def rewrite(path, change):
    """A zip of torch with its members changed."""
    with zipfile.ZipFile(path) as old:
        members = {m.filename: old.read(m) for m in old.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def _storage(edit):
    def change(members):
        name = next(n for n in members if n.endswith("data/0"))
        members[name] = edit(members[name])

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_storage(lambda b: b[:-4]), "smaller than a tensor of shape"),
        (_storage(lambda b: b""), "smaller than a tensor"),
        (lambda m: m.pop(next(n for n in m if n.endswith("data/0"))), "storage 0 is not there"),
        (lambda m: m.pop(next(n for n in m if n.endswith("data.pkl"))), "a zip without data.pkl"),
        (lambda m: m.update({next(n for n in m if n.endswith("data.pkl")): b"junk"}), "cannot be read"),
        (
            lambda m: m.update({next(n for n in m).split("/")[0] + "/constants.pkl": b""}),
            "a TorchScript archive, which holds code",
        ),
    ],
)
def test_a_damaged_zip_is_one_error(change, words, tmp_path):
    torch.save({"patch_embed.proj.weight": torch.ones(8)}, tmp_path / "x")
    rewrite(tmp_path / "x", change)
    with pytest.raises((UsageError, DamagedError), match=words):
        loaded(read_file(tmp_path / "x").data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_one_error(zipped, tmp_path):
    torch.save(STATE, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x").read_bytes()
    for n in range(1, len(whole), max(len(whole) // 40, 1)):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises((UsageError, DamagedError)):
            loaded(read_file(tmp_path / "cut").data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_changed_byte_is_read_or_one_error(zipped, tmp_path):
    torch.save({k: STATE[k] for k in ("float", "half", "part")}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    whole, random = (tmp_path / "x").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] = random.integers(256)
        (tmp_path / "y").write_bytes(damaged)
        try:
            data = read_file(tmp_path / "y").data
            for value in data.values() if isinstance(data, dict) else ():
                if isinstance(value, StoredTensor):
                    value.load()
        except (UsageError, DamagedError):
            pass


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("huge header", struct.pack("<Q", 2**40) + b"{}", "no known kind|no safetensors"),
        ("header beyond", struct.pack("<Q", 100) + b"{}", "no known kind|no safetensors"),
        ("index.json", b'{"weight_map": []}', "without a weight_map"),
        ("broken.json", b'{"weight_map"', "none; wanted safetensors"),
        ("deep.json", b'{"a":' * 50000, "none; wanted|damaged"),
        ("self.json", b'{"weight_map": {"a": "self.json"}}', "cannot be read"),
        ("npz", b"PK\x03\x04 no zip", "a damaged zip"),
        ("gzip", b"\x1f\x8b\x08", "is gzipped"),
        ("hdf5", b"\x89HDF\r\n", "HDF5"),
        ("pickle", pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    ],
)
def test_what_is_no_file_of_weights_says_what_it_is(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_file(tmp_path / name)


def test_arrays_of_python_objects_and_of_false_sizes_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([Calls(os.mkdir, str(tmp_path / "ran"))], dtype=object))
    with pytest.raises(UsageError, match="Python objects"):
        read_file(tmp_path / "objects.npz")
    assert not (tmp_path / "ran").exists()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(UsageError, match="array x is cut short"):
        read_file(tmp_path / "large.npz")


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path):
    small = torch.ones(1)
    torch.save({"a": small.expand(2**31, 2**20)}, tmp_path / "x")
    with pytest.raises(DamagedError, match="repeats its few stored values"):
        read_file(tmp_path / "x").data["a"].load()


@pytest.mark.parametrize("harm", ["damaged data", "encrypted"])
def test_a_compressed_npz_that_cannot_be_read_is_one_error(harm, tmp_path):
    """The directory of the zip is whole: only reading a member finds out."""
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=(40, 40)))
    content = bytearray(path.read_bytes())
    if harm == "encrypted":
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + flags] |= 1
    else:
        content[60:66] = b"\xff" * 6
    path.write_bytes(content)
    with pytest.raises(UsageError, match="a damaged npz"):
        load_model("vit_tiny_patch16_224", {"depth": 1}, checkpoint=path)
