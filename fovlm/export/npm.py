"""Packages of the page from the npm registry, by the npm client: pinned, checked by their integrity hash, cached."""

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from fovlm.errors import UserError
from fovlm.fileio import write_atomically
from fovlm.paths import cache_root

# Name and version -> integrity hash, as in a package-lock.json, and the files that the page needs.
PACKAGES = {
    "onnxruntime-web@1.30.0": (
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        ("dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
    "@huggingface/tokenizers@0.2.0": (
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        ("dist/tokenizers.min.mjs",),
    ),
}


def cached(package: str) -> Path:
    """Where the cache has the file of a package."""
    return cache_root() / "npm" / f"{package.replace('/', '-').lstrip('@')}.tgz"


def tarball(package: str) -> Path:
    """The file of a package, from the cache or the registry. Raises UserError if it is not there, or not the pinned
    one."""
    file = cached(package)
    if not file.is_file():
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True, check=True)
            except FileNotFoundError as error:
                raise UserError(f"the page needs {package}, and npm to fetch it: install Node.js") from error
            except subprocess.CalledProcessError as error:
                reason = next((line for line in error.stderr.splitlines() if line), "")
                raise UserError(f"npm cannot fetch {package}, which the page needs: {reason[:160]}") from error
            (packed,) = Path(folder).iterdir()
            write_atomically(file, packed.read_bytes())
    hashed = "sha512-" + base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if hashed != PACKAGES[package][0]:
        file.unlink()
        raise UserError(f"{package} is not the pinned package (its hash is {hashed[:20]}…): removed, try again")
    return file


def unpack(out: Path) -> None:
    """Write the files that the page needs into a folder. Raises UserError."""
    for package, (_, wanted) in PACKAGES.items():
        with tarfile.open(tarball(package)) as packed:
            for name in wanted:
                member = packed.extractfile(f"package/{name}")
                assert member is not None
                (out / Path(name).name).write_bytes(member.read())


if __name__ == "__main__":
    for package in PACKAGES:
        print(tarball(package))
