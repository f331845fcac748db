"""Tables of raw data sets (CSV, JSON, JSONL, parquet), read in blocks of rows. The only module that imports pyarrow.

A block is cheap to read at once: a row group of a parquet file, or neighbouring lines of a text file. One pass over the
files finds all blocks and keeps only their positions, so tables of any size can be shuffled.
"""

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fovlm.errors import SampleError, UserError, did_you_mean

LINES = 64  # rows in a block of a text file: small blocks mix well, and each is one read
FORMATS = {"parquet": "parquet", "csv": "csv", "jsonl": "jsonl", "json": "json"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """`rows` rows of a table from row `first` on, at `place`: the offset of `length` bytes, or the row group."""

    file: Path
    format: str  # one of FORMATS, or "sidecar": one JSON file per row
    first: int
    rows: int
    place: int = 0
    length: int = 0
    names: tuple[str, ...] = ()  # the columns of a CSV; the files of a sidecar block


def find_tables(where: Path, formats: tuple[str, ...]) -> list[Path]:
    """The tables at `where`, a file or a folder (with subfolders for parquet). Raises UserError if there are none."""
    kinds = " or ".join(f"*.{name}" for name in formats)
    if where.is_file():
        if where.suffix[1:].lower() not in formats:
            raise UserError(f"{where} is not a table of this source (expected {kinds})")
        return [where]
    if not where.is_dir():
        near = did_you_mean(where.name, (p.name for p in where.parent.iterdir())) if where.parent.is_dir() else ""
        raise UserError(f"no such file or folder: {where}{near}")
    for name in formats:
        if found := _tables_in(where, name):
            return found
    raise UserError(f"{where} holds no {kinds}: give the folder that does, or the file itself")


def refuse_twice(tables: list[Path], raw: Path, whole: str) -> None:
    """`whole` is a file or folder that repeats the rows of all others. Raises UserError if both would be read."""
    within = {table: table.relative_to(raw).parts for table in tables}
    parts = [table for table in tables if whole not in within[table]]
    if parts and len(parts) < len(tables):
        place = next(names for names in within.values() if whole in names)
        at = raw.joinpath(*place[: place.index(whole) + 1])
        raise UserError(f"the rows of {parts[0]} are also in {at} and would come twice: give {at} as IN")


def _tables_in(folder: Path, name: str) -> list[Path]:
    if name == "parquet":
        return sorted(folder.rglob("*.parquet"))
    found = sorted(folder.glob(f"*.{name}"))
    return [file for file in found if name != "json" or _is_list(file)]  # other JSON files are metadata


def _is_list(file: Path) -> bool:
    with open(file, "rb") as data:
        return data.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def blocks_of(file: Path, needs: tuple[tuple[str, ...], ...]) -> list[Block]:
    """The blocks of one table. `needs` are the required columns, each with its alternative names.

    Raises UserError naming the file, the missing column and the columns present.
    """
    try:
        kind = FORMATS[file.suffix[1:].lower()]
        if kind == "parquet":
            columns, blocks = _parquet_blocks(file)
        elif kind == "json":
            rows = read_json_list(file)
            columns, blocks = _keys(rows[:LINES]), [Block(file, kind, 0, len(rows))] if rows else []
        else:
            columns, blocks = _line_blocks(file, kind)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not blocks:
        return []
    for names in needs:
        if not set(names) & set(columns):
            near = did_you_mean(names[0], columns)
            raise UserError(f"{file} has no column '{names[0]}'{near}; its columns are: {', '.join(columns)}")
    return blocks


def sidecar_blocks(folder: Path, formats: tuple[str, ...]) -> list[Block]:
    """Blocks of JSON files beside videos, as video2dataset writes them. Empty if there are none, or a table too.

    video2dataset also writes NAME.parquet and NAME_stats.json about the download; they are ignored.
    """
    if not folder.is_dir() or any(_tables_in(folder, name) for name in formats if name != "parquet"):
        return []
    files = [p for p in folder.rglob("*.json") if not p.name.endswith("_stats.json")]
    has_parquet = "parquet" in formats and _tables_in(folder, "parquet")
    if has_parquet and not any(p.with_suffix(".mp4").is_file() for p in files):
        return []
    names = sorted(str(p.relative_to(folder)) for p in files)
    starts = range(0, len(names), LINES)
    return [Block(folder, "sidecar", i, len(part := names[i : i + LINES]), names=tuple(part)) for i in starts]


def read_block(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    """The rows of a block; the cause in place of an unreadable row. Only `columns` of parquet files are read."""
    if block.format == "parquet":
        return _parquet_rows(block, columns)
    if block.format == "json":
        return list(read_json_list(block.file))
    if block.format == "sidecar":
        return [_row_of((block.file / name).read_bytes(), {"file": name}) for name in block.names]
    with open(block.file, "rb") as file:
        file.seek(block.place)
        data = file.read(block.length)
    if block.format == "jsonl":
        return [_row_of(line) for line in data.split(b"\n") if line.strip()]
    lines = (line.decode("utf-8", "replace") for line in data.splitlines(keepends=True))
    return [_csv_row(block.names, cells) for cells in csv.reader(lines) if cells]


def pick(row: Row, *names: str) -> Any:
    """The value of the first of these columns that has one. Raises SampleError."""
    for name in names:
        if (value := row.get(name)) is not None and value != "":
            return value
    raise SampleError(f"no {names[0]}")


def _row_of(line: bytes, more: Row | None = None) -> Row | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "malformed JSON"
    return row | (more or {}) if isinstance(row, dict) else "malformed JSON"


def _csv_row(header: tuple[str, ...], cells: list[str]) -> Row | str:
    if len(cells) != len(header):
        return "row with too many or too few cells"
    return dict(zip(header, cells, strict=True))


def _header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines), [])


@functools.lru_cache(maxsize=2)
def read_json_list(file: Path) -> list[Row]:
    """A JSON file that holds a list of objects. Raises UserError."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} is not a JSON list of objects")
    return rows


def _line_blocks(file: Path, kind: str) -> tuple[list[str], list[Block]]:
    """(columns, blocks) of a CSV or JSONL file, from one pass over it."""
    blocks: list[Block] = []
    columns: list[str] = []
    rows = start = 0
    with open(file, "rb") as data:
        ends = _csv_ends(data, file) if kind == "csv" else _jsonl_ends(data)
        if kind == "csv":
            columns = _header(file)
            start = next(ends, 0)
        while some := list(islice(ends, LINES)):
            blocks.append(Block(file, kind, rows, len(some), start, some[-1] - start, tuple(columns)))
            rows, start = rows + len(some), some[-1]
    if kind == "jsonl" and blocks:
        columns = _keys(read_block(blocks[0], ()))
        if not columns:
            raise UserError(f"{file} is not JSONL: none of its first lines is a JSON object")
    return columns, blocks


def _keys(rows: Sequence[Row | str]) -> list[str]:
    """The keys of all rows: JSON rows may omit keys without a value."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def _jsonl_ends(file: BinaryIO) -> Iterator[int]:
    """The end of each line that is not empty."""
    place = 0
    for line in file:
        place += len(line)
        if line.strip():
            yield place


def _csv_ends(file: BinaryIO, path: Path) -> Iterator[int]:
    """The end of each row of a CSV file, the header's first. A quoted cell may span lines."""
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            place += len(line)
            yield line.decode("utf-8", "replace")

    try:
        for cells in csv.reader(lines()):  # reads exactly the lines of a row
            if cells:
                yield place
    except csv.Error as error:
        raise UserError(f"{path} is not CSV after byte {place}: {error}") from error


def _open_parquet(file: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'fovlm[data]'") from None
    try:
        return parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise UserError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})") from error


def _parquet_blocks(file: Path) -> tuple[list[str], list[Block]]:
    with _open_parquet(file) as table:
        blocks, first = [], 0
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if rows:
                blocks.append(Block(file, "parquet", first, rows, group))
            first += rows
        return list(table.schema_arrow.names), blocks


def _parquet_rows(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    with _open_parquet(block.file) as table:
        present = [name for name in columns if name in table.schema_arrow.names]
        try:
            return list(table.read_row_group(block.place, columns=present).to_pylist())
        except (ValueError, OSError):
            return ["damaged row group"] * block.rows
