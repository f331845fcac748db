"""Five pictures of each name of `fovlm prepare scenes`: python -m benchmarks.scene_emoji RAW OUT PACKAGE.tgz ...

The first is RAW's, the others are emoji of npm packages, in the order of their files; OUT is a folder like RAW, whose
films it links. docs/evidence.md names the packages, which have licenses of their own.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

CODES = {
    "frog": "1f438", "butterfly": "1f98b", "elephant": "1f418", "giraffe": "1f992", "penguin": "1f427",
    "tiger": "1f405", "zebra": "1f993", "owl": "1f989", "banana": "1f34c", "strawberry": "1f353", "carrot": "1f955",
    "pineapple": "1f34d", "airplane": "2708-fe0f", "teapot": "1fad6", "violin": "1f3bb", "basketball": "1f3c0",
}  # fmt: skip


def emoji(package: Path) -> dict[str, bytes]:
    """The picture of every name in a package. Raises KeyError when one is missing."""
    with tarfile.open(package) as tar:
        files = {Path(file).stem: file for file in tar.getnames() if Path(file).parent.name in ("64", "assets")}
        return {name: tar.extractfile(files[code]).read() for name, code in CODES.items()}  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("packages", type=Path, nargs="+")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: give a new folder")
    stamps, folder = (options.raw / "stamps").resolve(), options.out / "stamps"
    folder.mkdir(parents=True)
    (options.out / "clips").symlink_to(stamps.parent / "clips")
    named = {row["caption"]: row for row in map(json.loads, reversed((stamps / "stamps.jsonl").open().readlines()))}
    first = {name: named.get(f"A {name}.") or named[f"An {name}."] for name in CODES}
    lines = [row | {"file": str(stamps / row["file"])} for row in first.values()]
    for package in options.packages:
        for name, picture in emoji(package).items():
            file = f"{name}-{package.stem}.png"
            Image.open(io.BytesIO(picture)).save(folder / file)
            lines.append(first[name] | {"file": file})
    (folder / "stamps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
