"""Puts into the package what a checkout has beside it: experiments, DeepSpeed's files, and the kernels.

The kernels are installed as `fovlm.kernels`, never as `kernels`: that is the name of Hugging Face's package.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = {"experiments": "*.*", "ds_configs": "*.json", "kernels": "*.py"}
IMPORT = re.compile(r"^(\s*(?:from|import)) kernels\b", re.MULTILINE)


class Build(build_py):
    """Copies the folders beside the package into it, and renames imports of the kernels."""

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib) / "fovlm"
        for folder, pattern in BESIDE.items():
            shutil.rmtree(package / folder, ignore_errors=True)  # of an earlier build
            (package / folder).mkdir(parents=True)
            for file in (Path(__file__).parent / folder).glob(pattern):
                shutil.copy(file, package / folder)
        for file in package.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            if (renamed := IMPORT.sub(r"\1 fovlm.kernels", text)) != text:
                file.write_text(renamed, encoding="utf-8")


setup(cmdclass={"build_py": Build})
