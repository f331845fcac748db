"""The command line of launch.sh."""

import argparse
import re
from dataclasses import dataclass
from typing import NoReturn

from fovlm.errors import UserError
from fovlm.paths import TRAIN

# Options of deepspeed that choose nodes or GPUs themselves.
CHOOSES = re.compile(r"--?(i|e|H|include|exclude|num_gpus|num_nodes|num_accelerators|hostfile)(=|$)")


@dataclass(frozen=True)
class Request:
    """A parsed command line: `words` are the run's name and its overrides, `options` are for the launcher."""

    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    list_runs: bool = False
    dry_run: bool = False

    @property
    def chooses(self) -> bool:
        """Whether the launcher's options say where to run; the number of ranks is then unknown here."""
        return any(CHOOSES.match(option) for option in self.options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the usage")


def parse(words: list[str]) -> Request:
    """The request of a command line. Raises UserError."""
    split = words.index("--") if "--" in words else len(words)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume")
    known, unknown = parser.parse_known_intermixed_args(words[:split])
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help shows all (options of the launcher come after --)")
    names = [word for word in known.words if "=" not in word]
    overrides = [word for word in known.words if "=" in word]
    if known.resume is not None:
        overrides.append(f"train.resume={known.resume}")
    if len(names) > 1 and "." in names[1]:
        raise UserError(f"'{names[1]}': a setting is section.key=value")
    if len(names) > 1:
        raise UserError(f"'{names[1]}': one run at a time, and '{names[0]}' was given (fovlm sweep starts several)")
    if not names and not known.list:
        raise UserError(f"which run? {TRAIN} --list shows all; {TRAIN} quickstart is a good first")
    return Request((*names, *overrides), tuple(words[split + 1 :]), known.list, known.dry_run)
