"""The command line of launch.sh."""

import argparse
from dataclasses import dataclass
from typing import NoReturn

from fovlm.errors import UserError
from fovlm.paths import TRAIN


@dataclass(frozen=True)
class Request:
    """A parsed command line: `words` are the run's name and its overrides."""

    words: tuple[str, ...]
    list_runs: bool = False
    dry_run: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the usage")


def parse(words: list[str]) -> Request:
    """The request of a command line. Raises UserError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume")
    known, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help shows all")
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
    return Request((*names, *overrides), known.list, known.dry_run)
