"""Results in a table for the terminal and for Markdown: a row for each set and control, a column for each mode."""

from collections.abc import Sequence
from typing import Any

from fovlm.model.modes import MODES

ORDER = list(dict.fromkeys(mode for modes in MODES.values() for mode in modes))
Result = dict[str, Any]
Table = list[list[str]]  # rows of cells, the header first


def main_tables(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """One table for each protocol: accuracy is never beside a loss, nor one kind of likelihood beside another."""
    found = []
    for protocol in dict.fromkeys(result["protocol"] for result in results):
        mine = [result for result in results if result["protocol"] == protocol]
        found.append((_title(protocol), _main(mine)))
        if any("accuracy" in result for result in mine):  # one of a set without a scored sample has none
            normalised = _main(mine, "accuracy_normalised", "interval_normalised")
            found.append((_title(f"{protocol}, per token"), normalised))
    return found


def parts_tables(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """For each set and control: accuracies by category and whatever else sorts it; losses by source and modality."""
    found = []
    for name in dict.fromkeys(map(_name, results)):
        mine = [result for result in results if _name(result) == name and result["n"]]
        if not mine:
            continue
        keys = [key for key in mine[0] if key.startswith("by_")] if "accuracy" in mine[0] else []
        for key in keys:
            found.append((f"{name}, accuracy by {key.removeprefix('by_')}", _parts(mine, key, _accuracy)))
        for key in ("source", "modality"):
            found.append((f"{name}, loss by {key}", _parts(mine, f"loss_by_{key}", "{:.4f}".format)))
    return found


def text(table: Table) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    wide = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True)))
        for row in table
    ]


def markdown(titled: Sequence[tuple[str, Table]]) -> str:
    """All tables as a page."""
    parts = []
    for title, table in titled:
        rule = "|---|" + "---:|" * (len(table[0]) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in table]
        parts.append("\n".join([f"**{title}**", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def _title(protocol: str) -> str:
    return "loss of the answer (nats a token)" if protocol.startswith("loss") else f"accuracy % [95 %], by {protocol}"


def _name(result: Result) -> str:
    return f"{result['set']}/{result['control']}" if result["control"] else str(result["set"])


def _modes(results: Sequence[Result]) -> list[str]:
    return [mode for mode in ORDER if any(result["mode"] == mode for result in results)]


def _main(results: Sequence[Result], share: str = "accuracy", interval: str = "interval") -> Table:
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
            elif accuracy:
                row.append(_accuracy({"accuracy": result[share], "interval": result[interval]}))
            else:
                row.append(f"{result['loss']:.4f}")
        table.append(row)
    return table


def _parts(results: Sequence[Result], key: str, told: Any) -> Table:
    modes = _modes(results)
    by_mode = {result["mode"]: result for result in results}
    table = [[key.removeprefix("loss_").removeprefix("by_"), "n", *modes]]
    for part in dict.fromkeys(part for result in results for part in result[key]):
        some = next(result for result in results if part in result[key])
        n = some[key][part]["n"] if isinstance(some[key][part], dict) else some[f"samples_{key[5:]}"][part]
        row = [told(by_mode[m][key][part]) if part in by_mode[m][key] else "-" for m in modes]
        table.append([part, str(n), *row])
    return table


def _accuracy(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
