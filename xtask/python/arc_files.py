"""Reading safetensors files for the public package, with torch or with the stand-in for it."""

import json
import warnings

import torch

# The package wraps read-only buffers; torch says so once for each process.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


def load(path):
    """Tensors by name, and the file's metadata."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    metadata = header.pop("__metadata__", {})
    body = memoryview(data)[8 + size :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = DTYPES[entry["dtype"]]
        if start == end:
            tensors[name] = torch.empty(tuple(entry["shape"]), dtype=kind)
        else:
            # A copy, because an entry of a file need not lie on a boundary of its dtype.
            raw = torch.frombuffer(bytearray(body[start:end]), dtype=kind)
            tensors[name] = raw.reshape(tuple(entry["shape"]))
    return tensors, metadata


def data_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def difference(got, want):
    """None when both hold the same names, dtypes, shapes and bytes; else what differs first."""
    if sorted(got) != sorted(want):
        return f"names differ: {sorted(set(got) ^ set(want))}"
    for name, tensor in want.items():
        other = got[name]
        if str(other.dtype) != str(tensor.dtype):
            return f"{name}: dtype {other.dtype}, wanted {tensor.dtype}"
        if tuple(other.shape) != tuple(tensor.shape):
            return f"{name}: shape {tuple(other.shape)}, wanted {tuple(tensor.shape)}"
        if data_bytes(other) != data_bytes(tensor):
            return f"{name}: bytes differ"
    return None
