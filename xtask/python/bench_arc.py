"""Measures the public package fireworks-delta-compression on one pair of files, for `cargo xtask bench codec --python`.

Prints one JSON object like that of `towline bench codec --json`. Files are read before the clock starts; each figure
is the best of `--rounds`. Extra memory is the peak of the process above what it held before the call (Linux only).
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import arc_files
import fireworks_delta_compression as public


def status_kib(field):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise OSError(f"no {field} in the process status")


def measured(rounds, call, before_each=lambda: None):
    best, extra, result = float("inf"), None, None
    for _ in range(rounds):
        result = None
        before_each()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = status_kib("VmRSS")
        except OSError:
            before = None
        started = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - started)
        if before is not None:
            extra = max(extra or 0.0, (status_kib("VmHWM") - before) / 1024)
    return best, extra, result


def bench(base, current, kind, rounds, pool, threads):
    raw = sum(tensor.numel() * tensor.element_size() for tensor in current.values())
    encode_seconds, encode_mib, (deltas, checksums) = measured(
        rounds, lambda: public.delta_compress_dicts(src=base, dst=current, compression_format=kind, executor=pool)
    )

    def decode_one(name):
        return public.delta_decompress(
            src=base[name], compressed_diff=deltas[name], checksum=checksums[name], compression_format=kind
        )

    decode_seconds, decode_mib, decoded = measured(rounds, lambda: dict(zip(base, pool.map(decode_one, base))))
    problem = arc_files.difference(decoded, current)
    if problem:
        raise SystemExit(f"{kind}: the package does not read back what it wrote: {problem}")
    encoded = sum(tensor.numel() for tensor in deltas.values())
    mib = [value for value in (encode_mib, decode_mib) if value is not None]
    return {
        "codec": kind,
        "ratio": encoded / raw,
        "encode_gbps": raw / encode_seconds / 1e9,
        "decode_gbps": raw / decode_seconds / 1e9,
        "extra_mib": max(mib) if mib else None,
        "encoded_bytes": encoded,
        "raw_bytes": raw,
        "threads": threads,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", required=True)
    parser.add_argument("--current", required=True)
    parser.add_argument("--codecs", default="arc_v1,arc_v2,arc_v3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    base, _ = arc_files.load(options.parent)
    current, _ = arc_files.load(options.current)
    with ThreadPoolExecutor(options.threads) as pool:
        kinds = options.codecs.split(",")
        rows = [bench(base, current, kind, options.rounds, pool, options.threads) for kind in kinds]
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
