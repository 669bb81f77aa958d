"""Runs slime's own code on directories: its trainer writes them, its engine reads them.

Needs a checkout of github.com/THUDM/slime, and numpy, safetensors, zstandard, xxhash and blake3; no torch.

  slime_directories.py CHECKOUT write OUT                        the golden directories of storage/tests/golden/slime
  slime_directories.py CHECKOUT pull BASE SOURCE VERSION LOCAL   what an engine makes of ours, in LOCAL
"""

import importlib
import json
import os
import shutil
import sys
import threading
import types

import numpy as np

RANKS = 2
rank = threading.local()
meeting = threading.Barrier(RANKS)
table = [None] * RANKS


class Tensor:
    """What the trainer asks of a tensor."""

    def __init__(self, data):
        self.data = np.frombuffer(data, dtype=np.uint8)

    def numel(self):
        return self.data.size

    def numpy(self):
        return self.data

    detach = contiguous = cpu = lambda self: self
    view = reshape = lambda self, _: self


def gather(into, value, group):
    table[rank.number] = value
    meeting.wait()
    into[:] = table
    meeting.wait()


def unpinned(*_, **__):
    raise RuntimeError("no pinned memory here")


def module(name, **content):
    made = sys.modules[name] = types.ModuleType(name)
    made.__dict__.update(content)
    return made


def trainer(checkout):
    """The trainer's class, with as much of its surroundings as two of its methods need."""
    dist = module("torch.distributed", get_world_size=lambda: RANKS, get_rank=lambda: rank.number,
                  all_gather_object=gather, barrier=lambda group=None: meeting.wait())
    nn = module("torch.nn", Module=object)
    module("torch", no_grad=lambda: lambda function: function, nn=nn, distributed=dist, uint8="uint8", Tensor=Tensor,
           empty=unpinned)
    module("ray")
    module("ray.actor", ActorHandle=object)
    module("megatron")
    module("megatron.core", mpu=None)
    for name in ["slime", "slime.utils", "slime.backends", "slime.backends.megatron_utils",
                 "slime.backends.megatron_utils.update_weight"]:
        module(name, __path__=[os.path.join(checkout, *name.split("."))])
    sys.modules["slime.utils"].accelerator = module("slime.utils.accelerator")
    module("slime.utils.distributed_utils", get_gloo_group=lambda: None)
    home = "slime.backends.megatron_utils.update_weight"
    module(f"{home}.update_weight_from_distributed", UpdateWeightFromDistributed=object)
    return importlib.import_module(f"{home}.update_weight_from_disk_delta").UpdateWeightFromDiskDelta


def engine(checkout):
    """The engine's module, which is kept as a patch of another project."""
    with open(os.path.join(checkout, "docker/patch/latest/sglang-pull_weights.patch")) as file:
        patch = file.read()
    lines = patch.partition("+++ b/python/sglang/srt/weight_sync/local_checkpoint.py\n")[2].splitlines()[1:]
    made = module("local_checkpoint")
    exec("\n".join(line[1:] for line in lines if line.startswith("+")), made.__dict__)
    return made


def save(path, tensors):
    """A plain safetensors file; tensors are (dtype, shape, bytes)."""
    header, place = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def load(path):
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    places = json.loads(data[8:start])
    places.pop("__metadata__", None)
    return {name: data[start + place["data_offsets"][0] : start + place["data_offsets"][1]]
            for name, place in places.items()}


def write(checkout, out):
    random = np.random.default_rng(7)
    shapes = {
        "double": ("F64", [], 8), "long": ("I64", [3], 24), "single": ("F32", [7, 5], 140), "half": ("F16", [9], 18),
        "brain": ("BF16", [31, 37], 2294), "same": ("BF16", [11], 22), "byte": ("U8", [257], 257),
        "eight": ("F8_E4M3", [3, 5], 15), "truth": ("BOOL", [13], 13), "nothing": ("F32", [0, 4], 0),
    }
    now = {name: (dtype, shape, random.bytes(size)) for name, (dtype, shape, size) in shapes.items()}
    shutil.rmtree(out, ignore_errors=True)
    save(f"{out}/base/model.safetensors", now)
    kind = trainer(checkout)
    ranks = []
    for number in range(RANKS):
        one = kind.__new__(kind)
        one.delta_dir, one.weight_version, one._is_pp_src_rank = out, 0, True
        one._snapshot = {name: np.frombuffer(now[name][2], dtype=np.uint8) for name in sorted(now)[number::RANKS]}
        ranks.append(one)
    steps = [("xor", "xxh3-128", 3), ("overwrite", "blake3", 5), ("xor", "adler32", 0), ("overwrite", "adler32", 2)]
    for encoding, checksum, every in steps:
        for name, (dtype, shape, data) in now.items():
            if every and name != "same" and len(data) > every:
                data = np.frombuffer(data, dtype=np.uint8).copy()
                data[every - 1 :: 8 * every] ^= random.integers(1, 255, dtype=np.uint8)
                now[name] = (dtype, shape, data.tobytes())

        def run(number):
            rank.number, one = number, ranks[number]
            one.weight_version += 1
            one.delta_encoding, one.checksum_algorithm = encoding, checksum
            one._iter_hf_tensors = lambda: [(name, Tensor(now[name][2])) for name in one._snapshot]
            one._publish()

        threads = [threading.Thread(target=run, args=[number]) for number in range(RANKS)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for step in range(1, len(steps) + 1):
        # Text of this repository ends with a newline.
        with open(f"{out}/weight_v{step:06d}/model.safetensors.index.json", "a") as file:
            file.write("\n")
    save(f"{out}/final/model.safetensors", now)


def pull(checkout, base, source, version, local):
    engine(checkout).pull(local, base, source, int(version))
    print(json.dumps(sorted(name for name in os.listdir(local) if not name.startswith("."))))


def main(checkout, command, *arguments):
    {"write": write, "pull": pull}[command](checkout, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
