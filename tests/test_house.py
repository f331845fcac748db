"""Rules for the whole source: layers of imports, who may import which package, length of files, declared packages."""

import ast
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

import fovlm
from fovlm.cli.main import app
from fovlm.config import experiments, schema
from fovlm.errors import UserError
from helpers import ROOT
from helpers.launch import fresh_python

FILES = sorted([*(ROOT / "fovlm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}

LONGEST = 350  # lines of a file

# The packages in reading order: a module imports only from its own entry and from those above.
# The package `fovlm` itself imports nothing of ours until asked for a name.
READING_ORDER = """
kernels
fovlm.errors fovlm.paths fovlm.fileio fovlm.redact fovlm.tables fovlm.progress fovlm.distributed
fovlm.config
fovlm.media
fovlm.data
fovlm.launch
fovlm.model
fovlm.estimate
fovlm.checkpoint
fovlm.viz
fovlm.export
fovlm.train
fovlm.eval
fovlm.sweep
fovlm.prepare
fovlm.report
fovlm.cli fovlm.__main__
"""
LAYERS = READING_ORDER.split()
# These must import fast, and on a machine without torch.
LIGHT = (
    "errors",
    "paths",
    "fileio",
    "redact",
    "config.experiments",
    "config.schema",
    "config.deepspeed",
    "config.existing_run",
    "launch.main",
    "data.inputs",
    "checkpoint.run_folder",
    "media.location",
    "model.folder",
    "model.modes",
    "train.schedule",
    "train.logger",
)
WITHOUT_TORCH = ["fovlm", *(f"fovlm.{name}" for name in LIGHT)]
# A third-party package, and the modules that import it: these and no others.
DOORS = {
    "webdataset": {"fovlm.data.shards"},
    "braceexpand": {"fovlm.data.shards", "fovlm.prepare.check"},
    "wandb": {"fovlm.train.logger"},
    "deepspeed": {"fovlm.checkpoint.universal", "fovlm.train.engine"},
    "triton": {"kernels.common"},
    "PIL": {"fovlm.media.collage", "fovlm.media.decode", "fovlm.media.encode", "fovlm.media.tolerant"},
    "simplejpeg": {"fovlm.media.decode", "fovlm.media.encode"},
    "av": {"fovlm.media.decode", "fovlm.media.encode", "fovlm.media.tolerant"},
    "matplotlib": {"fovlm.viz.contact_sheet", "fovlm.report.figures"},
    "pyarrow": {"fovlm.data.tables"},
    "peft": {"fovlm.model.lora"},
    "fsspec": {"fovlm.data.remote_fs"},
    "aiohttp": {"fovlm.data.remote_fs"},
    "botocore": {"fovlm.data.remote_fs"},
    "gradio": {"fovlm.viz.demo"},
    "onnxruntime": {"fovlm.export.runtime"},
    "starlette": {"fovlm.viz.demo"},
    "scipy": {"fovlm.eval.metrics", "fovlm.report.scaling_law", "fovlm.report.statistics"},
    "markdown_it": {"fovlm.report.document"},
    "lmms_eval": {"fovlm.eval.lmms_eval", "fovlm.eval.lmms_plugin"},
    "tokenizers": {"fovlm.data.tokenizers"},
    "typer": {f"fovlm.cli.{name}" for name in ("convert", "data", "evaluate", "main", "train", "use")},
}
FAMILIES = "fovlm.model.encoders"
# Names inside Hugging Face's vision transformers, which change between releases.
VIT_NAMES = (
    "layer_scale1",
    "layer_scale2",
    "lambda1",
    "patch_embeddings",
    "layer_norm1",
    "post_layernorm",
    "transformers.models.dino",
)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


@functools.cache
def imported(file: Path) -> frozenset[str]:
    """Full names of what a file imports, anywhere in it: `from a.b import c` gives `a.b` and `a.b.c`.

    Imports for type checkers alone (`if TYPE_CHECKING:`) never run and do not count.
    """
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _is_type_checking(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imports(module: str) -> frozenset[str]:
    return imported(MODULES[module])


def ours(module: str) -> set[str]:
    """The modules of ours that importing a module brings in directly: those it names, and the packages around them."""
    names = imports(module) & MODULES.keys()
    around = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    empty = {
        name for name in (names | around) if MODULES[name].name == "__init__.py" and not imports(name) & MODULES.keys()
    }
    return (names | around) - empty - {module}


def reached(module: str) -> set[str]:
    """Everything imported by a module and by the modules of ours that it imports."""
    found: set[str] = set()
    ahead = {module}
    seen: set[str] = set()
    while ahead:
        seen |= ahead
        found |= set().union(*(imports(name) | ours(name) for name in ahead))
        ahead = set().union(*(ours(name) for name in ahead)) - seen
    return found


def layer(module: str) -> int:
    """The number of a module's entry in LAYERS."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    entry = next((name for name in names if name in LAYERS), None)
    assert entry, f"{module} has no place in LAYERS"
    return LAYERS.index(entry)


def packages(names: frozenset[str] | set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", [*LAYERS, *WITHOUT_TORCH, *set().union(*DOORS.values()), FAMILIES])
def test_the_rules_name_modules_that_exist(name):
    assert name in MODULES, f"{name} is no module: write its new name here, or take it out"


def test_every_module_has_one_place_among_the_layers():
    assert len(LAYERS) == len(set(LAYERS))
    for module in MODULES.keys() - {"fovlm"}:
        layer(module)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    if module == "fovlm":
        assert not ours(module)
        return
    wrong = {name for name in ours(module) if layer(name) > layer(module)}
    assert not wrong, f"{module} must not import {wrong}, which come after it in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_goes_in_a_circle(module):
    assert module not in set().union(*(reached(name) & MODULES.keys() for name in ours(module)))


def test_the_top_has_few_files():
    assert len(list((ROOT / "fovlm").glob("*.py"))) <= 10


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_must_be_light_is(module):
    heavy = {"torch", "deepspeed", "transformers", "triton"} & packages(reached(module))
    assert not heavy


@pytest.mark.parametrize("package", DOORS)
def test_every_package_has_one_door(package):
    assert {module for module in MODULES if package in packages(imports(module))} == DOORS[package]


def test_names_inside_vision_transformers_stay_with_their_families():
    for module, file in MODULES.items():
        if module.startswith(FAMILIES):
            continue
        text = file.read_text(encoding="utf-8")
        assert not [name for name in VIT_NAMES if name in text], module
        assert not [name for name in imports(module) if name.startswith("transformers.") and "Dinov2" in name], module


def test_kernels_is_a_leaf():
    for module in MODULES:
        if module.startswith("kernels"):
            assert not packages(imports(module)) & {"fovlm", "transformers", "deepspeed"}, module
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr], "kernels/__init__.py holds a docstring and nothing else"


def test_no_test_file_imports_another():
    """What they share is in tests/helpers."""
    tests = {file.stem for file in TESTS if file.name.startswith("test_")}
    for file in TESTS:
        assert not tests & {part for name in imported(file) for part in name.split(".")}, file.name


def test_transformers_does_not_take_our_kernels_for_hugging_faces():
    code = """
import kernels, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert "site-packages" not in kernels.__file__, kernels.__file__
assert not is_kernels_available()
size = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(LlamaConfig(**size))
print("fine")
"""
    assert fresh_python(code).strip().endswith("fine")


@pytest.mark.parametrize("file", FILES + TESTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_and_every_one_says_what_it_is(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST, "one idea per file: split it"
    assert ast.get_docstring(ast.parse(text)) or file.name == "__init__.py", "needs a docstring: what it is for"


@pytest.mark.skipif(tomllib is None, reason="needs tomllib")
def test_every_import_is_declared_and_every_pin_is_in_its_range():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {(r := Requirement(text)).name.lower(): r for text in declared["dependencies"]}
    names = {"PIL": "pillow", "yaml": "pyyaml", "markdown_it": "markdown-it-py"}
    options = declared["optional-dependencies"]
    optional = {Requirement(text).name for texts in options.values() for text in texts}
    developed = [text for name in ("data", "demo", "lora", "remote", "export", "docs", "dev") for text in options[name]]
    extras = {(r := Requirement(text)).name.lower(): r for text in developed}
    used = set().union(*(packages(imports(module)) for module in MODULES)) - set(sys.stdlib_module_names)
    come_along = {"pydantic_core", "huggingface_hub", "starlette", "botocore"}  # pydantic, transformers, gradio, s3fs
    ours = {"fovlm", "kernels"} | come_along
    assert {names.get(package, package) for package in used - ours} - optional <= set(ranges)
    for file, wanted in (("requirements.txt", ranges), ("requirements-dev.txt", extras)):
        lines = (ROOT / file).read_text().splitlines()
        pins = [Requirement(pin) for line in lines if (pin := line.split("#")[0].strip())]
        for pin in pins:
            (version,) = [spec.version for spec in pin.specifier]
            assert str(pin.specifier).startswith("=="), pin
            assert wanted[pin.name.lower()].specifier.contains(version), pin
        assert {pin.name.lower() for pin in pins} == set(wanted), file


def test_the_changelog_opens_with_the_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == fovlm.__version__


def _commands() -> list[str]:
    """The commands in fenced blocks of the README and docs."""
    found = []
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        inside = False
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            if line.startswith("```"):
                inside = not inside
            elif inside:
                found.append(line.split(" #")[0].removeprefix("$ ").strip())
    return found


def test_documented_commands_exist():
    for command in _commands():
        words = shlex.split(command)
        while words and "=" in words[0]:
            words.pop(0)  # an environment variable
        if words[:1] == ["./launch.sh"]:
            arguments = words[1 : words.index("--")] if "--" in words else words[1:]
            plain = [word for word in arguments if not word.startswith("-")]
            if plain and plain[0] != "NAME":
                try:
                    schema.load(plain[0], [word for word in plain[1:] if "=" in word])
                except UserError as error:
                    pytest.fail(f"{command}: {error}")
        elif words[:1] == ["make"]:
            targets = (ROOT / "Makefile").read_text()
            assert all(f"\n{target}:" in targets for target in words[1:] if "=" not in target), command
        elif words[:2] == ["python", "-m"] and words[2].startswith(("fovlm", "kernels")):
            assert words[2] in MODULES or f"{words[2]}.__main__" in MODULES, command
        elif words[:1] == ["fovlm"]:
            known = typer.main.get_command(app).commands
            assert words[1] in known, command
            taken = known[words[1]].params
            options = {o for p in taken for o in (*p.opts, *p.secondary_opts, "--help")}
            assert {word for word in words if word.startswith("-") and word != "-"} <= options, command


def test_runs_start_from_runs_that_exist():
    for name in experiments.names():
        start = schema.load(name).model.init_from
        assert start is None or start in experiments.names(), name
