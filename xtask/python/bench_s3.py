"""Sends files to an S3 server and brings them back with the public packages, for `cargo xtask bench store --s3 --python`.

The first line of standard input names the bucket, and a server in memory that has some of its objects. Then come orders: one that names the files from now on, or one for a
group and a way. Each line is answered with one of JSON: what the packages are, nothing, or what a way took: seconds
(without the start of Python and imports), seconds of the processor in this process, and MiB of memory beyond what was
there. Server and keys are in the environment. Files go one after the other, as in the ways that they are compared with.
"""

import io
import json
import mmap
import os
import sys
import time

# No credentials but those of the environment, and no question to a server that only Amazon's machines have.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# What these packages call the region.
os.environ.setdefault("AWS_DEFAULT_REGION", os.environ.get("AWS_REGION", "us-east-1"))


def status(field):
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return None


def timed(work):
    """What `work` took, and its result."""
    try:
        before = status("VmRSS:")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
            refs.write("5")
    except OSError:
        before = None
    used, started = time.process_time(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    used = time.process_time() - used
    peak = None if before is None else max(0.0, status("VmHWM:") - before)
    return {"seconds": seconds, "cpu": used, "peak_mib": peak}, result


class Ways:
    def __init__(self, bucket, memory):
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        self.bucket = bucket
        # Fewer threads that hinder each other, longer parts, and no sums that nobody asks for.
        plain = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
        )
        self.few = TransferConfig(max_concurrency=4, multipart_chunksize=32 << 20, io_chunksize=1 << 20)
        self.servers = {}
        for server, endpoint in (("whole", os.environ["AWS_ENDPOINT_URL"]), ("memory", memory)):
            mountpoint = MountpointS3Client(
                region=os.environ["AWS_DEFAULT_REGION"],
                user_agent_prefix="towline-bench",
                endpoint=endpoint,
                force_path_style=True,
            )
            self.servers[server] = (
                boto3.client("s3", endpoint_url=endpoint),
                boto3.client("s3", endpoint_url=endpoint, config=plain),
                mountpoint,
            )
        self.choose("whole")
        self.dir = self.folder = self.down = ""
        self.files = []

    def load(self, order):
        self.dir, self.folder, self.down = order["dir"], order["folder"], order["down"]
        self.files = order["files"]

    def choose(self, server):
        self.boto3, self.boto3_tuned, self.mountpoint = self.servers[server]

    def path(self, name):
        return os.path.join(self.dir, name)

    def key(self, way, name):
        return f"{self.folder}/{way}/{name}"

    def up(self, way):
        if way == "s3torch":
            contents = []
            for name in self.files:
                with open(self.path(name), "rb") as file:
                    contents.append((self.key(way, name), file.read()))
            return timed(lambda: [self.put(key, data) for key, data in contents])[0]
        client, config = (self.boto3_tuned, self.few) if way == "boto3-tuned" else (self.boto3, None)

        def upload():
            for name in self.files:
                client.upload_file(self.path(name), self.bucket, self.key(way, name), Config=config)

        return timed(upload)[0]

    def put(self, key, data):
        stream = self.mountpoint.put_object(self.bucket, key)
        stream.write(data)
        stream.close()

    def get(self, key, kept):
        place = 0
        for part in self.mountpoint.get_object(self.bucket, key):
            kept[place : place + len(part)] = part
            place += len(part)
        return kept

    def bring(self, way):
        """Reads what `down` has sent; answers what it took."""
        keys = [self.key(self.down, name) for name in self.files]
        if way == "s3torch":
            # Memory that was touched before.
            kept = [bytearray(b"\1") * os.path.getsize(self.path(name)) for name in self.files]
            row, found = timed(lambda: [self.get(key, kept) for key, kept in zip(keys, kept)])
        elif way == "boto3-file":
            paths = [self.path(name) + ".down" for name in self.files]

            def download():
                for key, path in zip(keys, paths):
                    self.boto3.download_file(self.bucket, key, path)

            row, _ = timed(download)
            found = []
            for path in paths:
                with open(path, "rb") as file:
                    found.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                os.remove(path)
        else:
            client, config = (self.boto3_tuned, self.few) if way == "boto3-tuned" else (self.boto3, None)

            def read(key):
                buffer = io.BytesIO()
                client.download_fileobj(self.bucket, key, buffer, Config=config)
                return buffer.getbuffer()

            row, found = timed(lambda: [read(key) for key in keys])
        for name, data in zip(self.files, found):
            with open(self.path(name), "rb") as file:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as wanted:
                    with memoryview(wanted) as left, memoryview(data) as right:
                        if len(left) != len(right) or any(
                            bytes(left[at : at + (1 << 20)]) != bytes(right[at : at + (1 << 20)])
                            for at in range(0, len(left), 1 << 20)
                        ):
                            raise SystemExit(f"{way} did not bring what was sent: {name}")
        return row


def main():
    # The packages may print, and standard output is for the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.stdin.readline())
    ways = Ways(order["bucket"], order["memory"])
    import boto3
    import s3torchconnectorclient

    told = {"boto3": boto3.__version__, "s3torchconnectorclient": s3torchconnectorclient.__version__}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "files" in order:
            answer = ways.load(order)
        elif order["group"] == "up":
            ways.choose("whole")
            answer = ways.up(order["way"])
        else:
            ways.choose("memory" if order["group"] == "memory" else "whole")
            answer = ways.bring(order["way"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
