"""Saves, loads and stages a train state with the public packages, for `cargo xtask bench store --python`.

The first line of standard input names a folder and the tensors; each further line is a group and a way. Each line is
answered with one of JSON: what the packages are, then the seconds that a way took. All tensors are fp32 on the CPU, and
those that are loaded into were touched before. torch uses as many threads as copy fastest at the start: on a machine that
has other work too, threads that wait for each other lose time. torch.distributed.checkpoint runs as one process without a process group
(`no_dist=True`), with its default writer: one file, one thread, fsync.
"""

import json
import os
import shutil
import sys
import time
import warnings


def sync(path):
    for name in (path, os.path.dirname(path)):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Ways:
    def __init__(self, folder, tensors):
        import torch

        self.torch = torch
        self.folder = folder
        self.state = {}
        for name, shape in tensors:
            # Random bits: numbers of all sizes.
            bits = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
            self.state[name] = bits.view(torch.float32)
        self.kept = {name: tensor.clone() for name, tensor in self.state.items()}
        self.stager = None
        self.count = 0

    def path(self, name, fresh=False):
        folder = os.path.join(self.folder, name)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
            sync(folder)
        return os.path.join(folder, "state")

    def choose_threads(self):
        """Sets the number of threads with which torch copies fastest, and returns it."""
        most = self.torch.get_num_threads()
        times = {}
        for threads in (1, most, 1, most, 1, most):
            self.torch.set_num_threads(threads)
            started = time.perf_counter()
            self.fill(self.state)
            times.setdefault(threads, []).append(time.perf_counter() - started)
        best = min(times, key=lambda threads: sorted(times[threads])[len(times[threads]) // 2])
        self.torch.set_num_threads(best)
        return best

    def dcp(self):
        import torch.distributed.checkpoint

        return self.torch.distributed.checkpoint

    def save_torch(self, path):
        self.torch.save(self.state, path)
        sync(path)

    def save_safetensors(self, path):
        from safetensors.torch import save_file

        save_file(self.state, path)
        sync(path)

    def save_dcp(self, path):
        # Its writer syncs files and not their folder, which is left at that.
        self.dcp().save(self.state, checkpoint_id=path, no_dist=True)

    def fill(self, loaded):
        for name, tensor in self.kept.items():
            tensor.copy_(loaded[name])

    def load_torch(self, path):
        self.fill(self.torch.load(path))

    def load_torch_mmap(self, path):
        self.fill(self.torch.load(path, mmap=True))

    def load_safetensors(self, path):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as opened:
            for name, tensor in self.kept.items():
                tensor.copy_(opened.get_tensor(name))

    def load_dcp(self, path):
        self.dcp().load(self.kept, checkpoint_id=path, no_dist=True)

    def stall(self, way):
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stager = None
        if way == "dcp-cached":
            if self.stager is None:
                # Nothing that needs a GPU; its copy is kept from save to save.
                self.stager = DefaultStager(StagingOptions(False, False, False, False))
            stager = self.stager
        path = self.path(way, fresh=True)
        started = time.perf_counter()
        future = self.dcp().async_save(self.state, checkpoint_id=path, async_stager=stager, no_dist=True)
        seconds = time.perf_counter() - started
        future.result()
        return seconds

    def run(self, group, way):
        if group == "stall":
            return self.stall(way)
        if group == "load":
            for tensor in self.kept.values():
                tensor.view(-1).view(self.torch.int32)[::1024] ^= 0x55
        work = getattr(self, f"{group}_{way.replace('-', '_')}")
        path = self.path(way.removesuffix("-mmap"), fresh=group == "save")
        started = time.perf_counter()
        work(path)
        seconds = time.perf_counter() - started
        if group == "load":
            for name, tensor in self.kept.items():
                bits = self.torch.int32
                if not self.torch.equal(tensor.view(bits), self.state[name].view(bits)):
                    raise SystemExit(f"{way} did not load what was saved: {name}")
        return seconds


def main():
    # The packages may print, and standard output is for the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.filterwarnings("ignore")
    order = json.loads(sys.stdin.readline())
    ways = Ways(order["dir"], order["tensors"])
    import safetensors

    told = {"torch": ways.torch.__version__, "safetensors": safetensors.__version__, "threads": ways.choose_threads()}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps({"seconds": ways.run(order["group"], order["way"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
