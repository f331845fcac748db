#!/usr/bin/env python3
"""Count the lines of Python source by package, and of the core: config, data, model, train, and what training imports
of checkpoint.

    python scripts/count_lines.py
"""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("config", "data", "model", "train")


def imports(file: Path) -> set[str]:
    """Modules of checkpoint that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {node.module for node in nodes}
    return {name.split(".")[2] for name in names if name and name.startswith("fovlm.checkpoint.")}


def main() -> None:
    lines: Counter[str] = Counter()
    sizes: dict[Path, int] = {}
    for file in sorted([*ROOT.glob("fovlm/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        sizes[file] = len(file.read_text(encoding="utf-8").splitlines())
        parts = file.relative_to(ROOT).parts
        lines[parts[1] if len(parts) > 2 else "top" if parts[0] == "fovlm" else "kernels"] += sizes[file]
    checkpoint = ROOT / "fovlm" / "checkpoint"
    used, found = set(), set().union(*(imports(file) for file in ROOT.glob("fovlm/train/*.py")))
    while found - used:
        used |= found
        found = set().union(
            *(imports(checkpoint / f"{name}.py") for name in used if (checkpoint / f"{name}.py").is_file())
        )
    needed = sum(sizes.get(checkpoint / f"{name}.py", 0) for name in used)
    for package, count in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"{package:12}{count:7,}")
    print(f"{'all':12}{sum(lines.values()):7,}")
    print(f"{'core':12}{sum(lines[name] for name in CORE) + needed:7,}  ({', '.join(CORE)}, {needed} of checkpoint)")


if __name__ == "__main__":
    main()
