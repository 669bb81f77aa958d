"""Runs the public package fireworks-delta-compression on files, for `cargo xtask interop`.

Standard input: a JSON list of jobs. Standard output: one JSON object a job, in order, `{"error": null | text}`.
  {"do": "encode", "base", "current", "format", "out"}   write a delta file with the package
  {"do": "decode", "base", "delta", "format", "expect"}  decode tensor by tensor and compare with `expect`
  {"do": "patch", "base", "delta", "format", "expect", "scratch"}  apply in place to a copy and compare
"""

import json
import shutil
import sys

import arc_files
import fireworks_delta_compression as public


def encode(job):
    base, _ = arc_files.load(job["base"])
    current, _ = arc_files.load(job["current"])
    public.delta_compress_dicts_to_file(
        src=base, dst=current, diff_file=job["out"], compression_format=job["format"]
    )


def decode(job):
    base, _ = arc_files.load(job["base"])
    deltas, checksums = arc_files.load(job["delta"])
    if sorted(base) != sorted(deltas):
        return f"names differ: {sorted(set(base) ^ set(deltas))}"
    got = {
        name: public.delta_decompress(
            src=tensor, compressed_diff=deltas[name], checksum=checksums[name], compression_format=job["format"]
        )
        for name, tensor in base.items()
    }
    return arc_files.difference(got, arc_files.load(job["expect"])[0])


def patch(job):
    shutil.copyfile(job["base"], job["scratch"])
    public.delta_decompress_inplace(
        base_path=job["scratch"], diff_path=job["delta"], compression_format=job["format"]
    )
    return arc_files.difference(arc_files.load(job["scratch"])[0], arc_files.load(job["expect"])[0])


def main():
    actions = {"encode": encode, "decode": decode, "patch": patch}
    for job in json.load(sys.stdin):
        try:
            error = actions[job["do"]](job)
        except Exception as problem:  # The package raises many types; each is a result to report.
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    main()
