"""Lets the public cookbooks write and read run logs, by hand: how tests/fixtures of trainer-client were made and checked.

  tinker-write FOLDER              saves with CheckpointManager and save_checkpoint of tinker-cookbook
  tinker-read FOLDER               what its get_last_checkpoint finds there
  fireworks-write CHECKOUT FOLDER  saves with checkpoint_utils of the Fireworks cookbook (v1) and a dataloader.json (v2)
  fireworks-read CHECKOUT FOLDER   where its resolve_resume goes on

The clients are stand-ins: what is shown is the files. CHECKOUT is one of fw-ai/cookbook at a commit that has both
training/utils/checkpoint_utils.py and training/utils/checkpoints.py (27 April 2026). tinker-cookbook needs its package
`tinker` beside it, and nothing else. Prints one JSON object.
"""

import asyncio
import importlib
import json
import pathlib
import sys
import types


class Pending:
    """What a call of the Tinker client answers."""

    def __init__(self, path):
        self.path = path

    def __await__(self):
        return self
        yield


class TinkerClient:
    def save_state(self, name, ttl_seconds=None):
        return Pending(f"tinker://run-1/weights/{name}")

    def save_weights_for_sampler(self, name, ttl_seconds=None):
        return Pending(f"tinker://run-1/sampler_weights/{name}")

    def create_rest_client(self):
        return self

    async def delete_checkpoint_from_tinker_path(self, path):
        pass


def tinker_write(folder):
    from tinker_cookbook import checkpoint_utils as public

    async def run():
        client = TinkerClient()
        manager = public.CheckpointManager(client, client, folder, save_every=4, rolling_save_every=2)
        for step in range(1, 7):
            await manager.maybe_save_async(step, {"epoch": 0, "batch": step})
        await manager.finalize_async()
        # A key of the caller's own: signs beyond ASCII, a number that JSON does not have, a nested value.
        mine = {"batch": 7, "step": 7, "note": "Grüße \u2028 😀", "loss": float("nan"), "lr": {"now": 1e-05, "was": [0.5, None]}}
        await public.save_checkpoint_async(client, "probe", folder, mine, kind="sampler")
        await manager.save_final_async({"epoch": 1, "batch": 0, "final": True})

    asyncio.run(run())
    return {"lines": len(pathlib.Path(folder, "checkpoints.jsonl").read_text().splitlines())}


def tinker_read(folder):
    from tinker_cookbook import checkpoint_utils as public

    found = {key: public.get_last_checkpoint(folder, key) for key in ("state_path", "sampler_path", "batch")}
    shown = {key: record and record.to_dict() for key, record in found.items()}
    return {"lines": len(public.load_checkpoints_file(folder)), **shown}


def fireworks(checkout, module):
    """A module of the cookbook without the packages that its neighbours want."""
    for name in ("training", "training.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(pathlib.Path(checkout, *name.split(".")))]
        sys.modules[name] = package
    client = types.ModuleType("training.utils.client")
    client.ReconnectableClient = object
    sys.modules["training.utils.client"] = client
    return importlib.import_module(f"training.utils.{module}")


class FireworksClient:
    job_id = "job-7f3a"
    loaded = None

    def save_state(self, name):
        pass

    def save_weights_for_sampler_ext(self, name, checkpoint_type):
        return types.SimpleNamespace(snapshot_name=f"{name}-00ab12cd", path=None)

    def resolve_checkpoint_path(self, name, source_job_id=None):
        return f"cross_job://{source_job_id}/{name}"

    def load_state_with_optimizer(self, path):
        self.loaded = path


def fireworks_write(checkout, folder):
    public = fireworks(checkout, "checkpoint_utils")
    client = FireworksClient()
    shape = {"base_model": "accounts/fireworks/models/qwen3-8b", "training_shape": "accounts/fireworks/trainingShapes/ts-8b"}

    def save(step, kind, **more):
        state = {"step": step, "data_consumed": step * 32, **more, "source_job_id": client.job_id}
        public.save_checkpoint(client, f"step-{step}", folder, state, kind, **shape)

    # As its loops call it: supervised with a raw cursor, by reinforcement without, at the end both kinds.
    save(10, public.CheckpointKind.STATE, raw_rows_consumed=341)
    save(20, public.CheckpointKind.STATE)
    save(25, public.CheckpointKind.SAMPLER)
    save(30, public.CheckpointKind.BOTH, raw_rows_consumed=1022)

    kind = importlib.import_module("training.utils.checkpoints").TrainingCheckpoints
    newer = kind.__new__(kind)
    newer._log_path = folder
    for step in (10, 20, 30):
        newer._write_dataloader(f"step-{step}", step * 32)
    return {"lines": len(pathlib.Path(folder, "checkpoints.jsonl").read_text().splitlines())}


def fireworks_read(checkout, folder):
    public = fireworks(checkout, "checkpoint_utils")
    client = FireworksClient()
    info = public.resolve_resume(client, folder)
    return {"loaded": client.loaded, "resume": info and vars(info)}


COMMANDS = {
    "tinker-write": tinker_write,
    "tinker-read": tinker_read,
    "fireworks-write": fireworks_write,
    "fireworks-read": fireworks_read,
}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))


if __name__ == "__main__":
    main()
