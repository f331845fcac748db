"""The code inside a saved model, so that `trust_remote_code=True` loads it where fovlm is not installed.

`code/` of a model's folder holds the modules that inference needs, copied from the package with flat relative imports,
which are all that transformers follows. `auto_map` in config.json and processor_config.json names its classes. Where
fovlm is installed its own classes are used, and the folder's code never runs.
"""

import ast
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

FOLDER, ENTRY = "code", "processing"  # one entry for all classes: transformers copies the files once for each
AUTO_MAP = {
    "AutoConfig": f"{FOLDER}/{ENTRY}.FoveatedConfig",
    "AutoModel": f"{FOLDER}/{ENTRY}.FoveatedVLM",
    "AutoModelForImageTextToText": f"{FOLDER}/{ENTRY}.FoveatedVLM",
    "AutoProcessor": f"{FOLDER}/{ENTRY}.FoveatedProcessor",
}
OURS = re.compile(r"^( *from )((?:fovlm|kernels)(?:\.\w+)*)( import )(.*)", re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write `code/` into a model's folder: from the package, or from where this module itself was shipped to."""
    out = folder / FOLDER
    if not __name__.startswith("fovlm."):
        shutil.copytree(Path(__file__).parent, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__*"))
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, source in sources().items():
        (out / f"{name}.py").write_text(source, encoding="utf-8")


def sources() -> dict[str, str]:
    """The modules that inference needs, by the last part of their names."""
    ahead, found = {f"fovlm.model.{ENTRY}"}, {}
    while ahead:
        module = ahead.pop()
        spec = find_spec(module)
        assert spec is not None
        text = Path(str(spec.origin)).read_text(encoding="utf-8")
        found[module.rpartition(".")[2]] = OURS.sub(_relative, text)
        ahead |= {name for line in OURS.finditer(text) for name in _modules(line)}
        ahead = {name for name in ahead if name.rpartition(".")[2] not in found}
    return found


def _modules(line: re.Match[str]) -> list[str]:
    """The modules that an import statement of ours names: `from package import module, module`, or `from module`."""
    _, module, _, names = line.groups()
    spec = find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        return [module]
    statement = ast.parse(f"from . import {names}").body[0]
    assert isinstance(statement, ast.ImportFrom)
    return [f"{module}.{alias.name}" for alias in statement.names]


def _relative(line: re.Match[str]) -> str:
    start, module, middle, names = line.groups()
    plain = _modules(line) == [module]
    return f"{start}.{module.rpartition('.')[2] if plain else ''}{middle}{names}"
