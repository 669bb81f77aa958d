"""The small part of torch that fireworks-delta-compression 0.1.0 touches, over numpy.

The public package asks for torch, whose Linux wheels bring some 5 GB of GPU libraries; the package itself uses
torch only to hold bytes with a dtype and a shape. This stand-in lets the unmodified package run in a 100 MB
environment. `cargo xtask interop` without `--light` uses the real torch instead.
"""

import types

import numpy as np

__version__ = "2.1.0"
strided = "strided"
version = types.SimpleNamespace(hip=None, cuda=None)
cuda = types.SimpleNamespace(is_available=lambda: False)
nn = types.SimpleNamespace(Module=object)


class dtype:
    def __init__(self, name, storage):
        self.name = name
        self.storage = np.dtype(storage)

    def __repr__(self):
        return f"torch.{self.name}"


for _name, _storage in {
    "bool": "?", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8",
    "float16": "f2", "float32": "f4", "float64": "f8", "complex64": "c8",
    # numpy has none of these: their bits are held as unsigned integers.
    "bfloat16": "u2", "float8_e4m3fn": "u1", "float8_e4m3fnuz": "u1", "float8_e5m2": "u1", "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1", "float4_e2m1fn_x2": "u1",
}.items():
    globals()[_name] = dtype(_name, _storage)


class device:
    def __init__(self, kind):
        self.type = kind

    def __eq__(self, other):
        return isinstance(other, device) and self.type == other.type

    def __hash__(self):
        return hash(self.type)


_CPU = device("cpu")
_NATIVE = {np.dtype(t): globals()[n] for n, t in {
    "bool": "?", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8", "float16": "f2", "float32": "f4", "float64": "f8",
}.items()}


class Tensor:
    """Always dense, in C order, on the CPU; `array` has the storage type of `dtype`."""

    layout = strided
    device = _CPU

    def __init__(self, array, kind):
        assert array.dtype == kind.storage and array.flags.c_contiguous
        self.array = array
        self.dtype = kind

    @property
    def shape(self):
        return self.array.shape

    def contiguous(self):
        return self

    def is_contiguous(self):
        return True

    def cpu(self):
        return self

    def to(self, _device):
        return self

    def flatten(self):
        return Tensor(self.array.reshape(-1), self.dtype)

    def reshape(self, *shape):
        return Tensor(self.array.reshape(*shape), self.dtype)

    def view(self, kind):
        if kind.storage.itemsize == self.dtype.storage.itemsize:
            return Tensor(self.array.view(kind.storage), kind)
        assert self.array.ndim == 1, "a view of another width is taken of a flat tensor only"
        return Tensor(self.array.view(kind.storage), kind)

    def clone(self):
        return Tensor(self.array.copy(), self.dtype)

    def numpy(self):
        return self.array

    def numel(self):
        return self.array.size

    nelement = numel

    def element_size(self):
        return self.array.itemsize

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return types.SimpleNamespace(data_ptr=self.data_ptr, nbytes=lambda: self.array.nbytes)


def from_numpy(array):
    return Tensor(array, _NATIVE[array.dtype])


def frombuffer(buffer, dtype):
    return Tensor(np.frombuffer(buffer, dtype=dtype.storage), dtype)


def empty(shape, dtype, device=None):
    return Tensor(np.zeros(shape, dtype=dtype.storage), dtype)


def bitwise_xor(left, right):
    assert left.dtype is right.dtype
    return Tensor(np.bitwise_xor(left.array, right.array), left.dtype)


def inference_mode():
    return lambda function: function
