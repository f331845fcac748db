"""Results as tables: a row for each set and control, a column for each mode."""

from collections.abc import Callable, Sequence
from typing import Any

from fovlm.model.modes import MODES
from fovlm.tables import markdown_table

ORDER = list(dict.fromkeys(mode for modes in MODES.values() for mode in modes))
Result = dict[str, Any]
Table = list[list[str]]  # rows of cells, the header first


def main_tables(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """(title, table) for each protocol: accuracies, losses and kinds of likelihood are never in one table."""
    found = []
    for protocol in dict.fromkeys(result["protocol"] for result in results):
        rows = [result for result in results if result["protocol"] == protocol]
        if protocol.startswith("loss"):
            found.append(("loss of the answer (nats a token)", _main(rows)))
            continue
        found.append((f"accuracy % [95 %], by {protocol}", _main(rows)))
        if any("accuracy" in result for result in rows):  # absent from a set without a scored sample
            found.append((f"accuracy % [95 %], by {protocol}, per token", _main(rows, "_per_token")))
    return found


def group_tables(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """(title, table) for each set and control: accuracies by category and the like, losses by source and modality."""
    found = []
    for name in dict.fromkeys(map(_name, results)):
        rows = [result for result in results if _name(result) == name and result["n"]]
        if not rows:
            continue
        for key in [key for key in rows[0] if key.startswith("by_") and "accuracy" in rows[0]]:
            found.append((f"{name}, accuracy by {key.removeprefix('by_')}", _groups(rows, key, _accuracy)))
        for key in ("source", "modality"):
            found.append((f"{name}, loss by {key}", _groups(rows, f"loss_by_{key}", "{:.4f}".format)))
    return found


def markdown(tables: Sequence[tuple[str, Table]]) -> str:
    """All tables as one Markdown page."""
    return "\n\n".join(f"**{title}**\n\n{markdown_table(table)}" for title, table in tables) + "\n"


def _name(result: Result) -> str:
    return "/".join(filter(None, (result["set"], result["control"])))


def _modes(results: Sequence[Result]) -> list[str]:
    return [mode for mode in ORDER if any(result["mode"] == mode for result in results)]


def _main(results: Sequence[Result], suffix: str = "") -> Table:
    modes, accuracy = _modes(results), any("accuracy" in result for result in results)
    table = [["set", "n", *(["chance"] if accuracy else []), *modes]]
    for name in dict.fromkeys(map(_name, results)):
        by_mode = {result["mode"]: result for result in results if _name(result) == name}
        some = next(iter(by_mode.values()))
        row = [name, str(some["n"])]
        if accuracy:
            row.append(f"{100 * some['chance']:.1f}" if "chance" in some else "-")
        for mode in modes:
            result = by_mode.get(mode)
            if result is None or not result["n"]:
                row.append("-")
            else:
                row.append(_accuracy(result, suffix) if accuracy else f"{result['loss']:.4f}")
        table.append(row)
    return table


def _groups(results: Sequence[Result], key: str, cell: Callable[[Any], str]) -> Table:
    modes = _modes(results)
    by_mode = {result["mode"]: result for result in results}
    table = [[key.removeprefix("loss_").removeprefix("by_"), "n", *modes]]
    for group in dict.fromkeys(group for result in results for group in result[key]):
        some = next(result for result in results if group in result[key])
        n = some[key][group]["n"] if isinstance(some[key][group], dict) else some[f"samples_{key[5:]}"][group]
        cells = [cell(by_mode[m][key][group]) if group in by_mode[m][key] else "-" for m in modes]
        table.append([group, str(n), *cells])
    return table


def _accuracy(metrics: dict[str, Any], suffix: str = "") -> str:
    low, high = metrics[f"interval{suffix}"]
    return f"{100 * metrics[f'accuracy{suffix}']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
