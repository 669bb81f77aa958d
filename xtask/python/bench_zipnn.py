"""Measures the public package ZipNN on one pair of files or on one base, for `cargo xtask bench codec --python`.

A delta is the XOR of both checkpoints, a base the plain bytes, each with the element type that ZipNN is told. Takes and
prints the same as bench_arc.py; with `--install` it puts the package into the environment that runs it.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings

PACKAGE = "zipnn==0.5.4"
# What the package calls the element types; others go as plain bytes of 32-bit numbers, its own default for files.
DTYPES = {"torch.bfloat16": "bfloat16", "torch.float16": "float16", "torch.float32": "float32"}


def install():
    try:
        import zipnn  # noqa: F401
    except ImportError:
        words = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", PACKAGE]
        subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
    print(json.dumps({"package": PACKAGE}))


def bench(base, current, threads, rounds):
    import numpy
    from zipnn import ZipNN

    import arc_files
    from bench_arc import measured

    tools = {}

    def tool(kind):
        if kind not in tools:
            tools[kind] = ZipNN(input_format="byte", bytearray_dtype=kind, threads=threads)
        return tools[kind]

    plain = {name: numpy.frombuffer(arc_files.data_bytes(tensor), dtype=numpy.uint8) for name, tensor in current.items()}
    kinds = {name: DTYPES.get(str(tensor.dtype), "float32") for name, tensor in current.items()}
    old = None if base is None else {
        name: numpy.frombuffer(arc_files.data_bytes(tensor), dtype=numpy.uint8) for name, tensor in base.items()
    }
    raw = sum(len(data) for data in plain.values())

    def encode_one(name):
        # A buffer of its own each time, because the package works inside it.
        data = bytearray(plain[name]) if old is None else bytearray(plain[name] ^ old[name])
        return bytes(tool(kinds[name]).compress(data)) if data else b""

    def decode_one(name, encoded, target):
        if not encoded:
            return
        data = numpy.frombuffer(tool(kinds[name]).decompress(encoded), dtype=numpy.uint8)
        if old is None:
            target[:] = data
        else:
            target ^= data

    # The package has threads of its own, so tensors go one after the other.
    encode_seconds, encode_mib, encoded = measured(rounds, lambda: {name: encode_one(name) for name in plain})
    state = {}

    def fresh():
        state["targets"] = {
            name: (numpy.zeros_like(data) if old is None else old[name].copy()) for name, data in plain.items()
        }

    def decode():
        for name, target in state["targets"].items():
            decode_one(name, encoded[name], target)

    decode_seconds, decode_mib, _ = measured(rounds, decode, fresh)
    for name, target in state["targets"].items():
        if target.tobytes() != plain[name].tobytes():
            raise SystemExit(f"the package does not read back what it wrote: {name}")
    size = sum(len(data) for data in encoded.values())
    mib = [value for value in (encode_mib, decode_mib) if value is not None]
    return {
        "codec": "zipnn",
        "ratio": size / raw,
        "encode_gbps": raw / encode_seconds / 1e9,
        "decode_gbps": raw / decode_seconds / 1e9,
        "extra_mib": max(mib) if mib else None,
        "encoded_bytes": size,
        "raw_bytes": raw,
        "threads": threads,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--parent")
    parser.add_argument("--current")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.install:
        install()
        return
    # The package prints what it does, and standard output is for the result.
    told, sys.stdout = sys.stdout, open(os.devnull, "w")
    warnings.filterwarnings("ignore")
    import arc_files

    base = arc_files.load(options.parent)[0] if options.parent else None
    row = bench(base, arc_files.load(options.current)[0], options.threads, options.rounds)
    sys.stdout = told
    print(json.dumps({"rows": [row]}))


if __name__ == "__main__":
    main()
