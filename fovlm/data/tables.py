"""Tables of raw data sets (CSV, JSON, JSONL, parquet), read in blocks of rows. The only module that imports pyarrow.

A block is cheap to read at once: a row group of a parquet file, or neighbouring lines of a text file. One pass over the
files finds all blocks and keeps only their positions, so tables of any size can be shuffled.

Rows about the same video can be read as one, {"rows": [(line, row), ..]}: those with the same values in the columns
`same` that follow each other in a file, or in a row group of parquet; in a JSON list, wherever they are.
"""

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fovlm.errors import SampleError, UserError, did_you_mean, did_you_mean_path, needs

LINES = 64  # rows in a block of a text file: small blocks mix well, and each is one read
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """`rows` rows of a table from row `first` on, at `place`: the offset of `length` bytes, or the row group."""

    file: Path
    format: str  # parquet, csv, jsonl or json; or "rows": of a source that makes them itself
    first: int
    rows: int
    place: int = 0
    length: int = 0
    names: tuple[str, ...] = ()  # the columns of a CSV
    line: int = 0  # the number of its first line, which is `first` unless rows are read as one
    same: tuple[str, ...] = ()  # columns by which rows are read as one


def find_tables(where: Path, formats: tuple[str, ...]) -> list[Path]:
    """The tables at `where`, a file or a folder (with subfolders for parquet). Raises UserError if there are none."""
    kinds = " or ".join(f"*.{name}" for name in formats)
    if where.is_file():
        if where.suffix[1:].lower() not in formats:
            raise UserError(f"{where} is not a table of this source (expected {kinds})")
        return [where]
    if not where.is_dir():
        raise UserError(f"no such file or folder: {where}{did_you_mean_path(where)}")
    for name in formats:
        found = sorted(where.rglob("*.parquet") if name == "parquet" else where.glob(f"*.{name}"))
        if found := [file for file in found if name != "json" or _is_list(file)]:  # other JSON files are metadata
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


def _is_list(file: Path) -> bool:
    with open(file, "rb") as data:
        return data.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def blocks_of(file: Path, needs: tuple[tuple[str, ...], ...], same: tuple[str, ...] = ()) -> list[Block]:
    """The blocks of one table. `needs` are the required columns, each with its alternative names; rows with the same
    values in the columns `same` are read as one.

    Raises UserError naming the file, the missing column and the columns present.
    """
    try:
        kind = file.suffix[1:].lower()
        if kind == "parquet":
            columns, blocks = _parquet_blocks(file, same)
        elif kind == "json":
            rows = read_json_list(file)
            n = len(_json_rows(file, same))
            columns, blocks = _keys(rows[:LINES]), [Block(file, kind, 0, n, same=same)] if rows else []
        else:
            columns, blocks = _line_blocks(file, kind, same)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not blocks:
        return []
    for names in needs:
        if not {_column(name, columns) for name in names} & set(columns):
            near = did_you_mean(_column(names[0], columns), columns)
            raise UserError(f"{file} has no column '{names[0]}'{near}; its columns are: {', '.join(columns)}")
    return blocks


def read_block(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    """The rows of a block; the cause in place of an unreadable row. Only `columns` of parquet files are read."""
    rows = _read(block, columns)
    return _as_one(rows, block.same, block.line) if block.same and block.format != "json" else rows


def _as_one(rows: Sequence[Row | str], same: tuple[str, ...], line: int, anywhere: bool = False) -> list[Row | str]:
    """Rows, of which the first is number `line`, as {"rows": [(line, row), ..]}: neighbours, or all with `anywhere`,
    that have the same values."""
    found: dict[tuple[int, Any], list[tuple[int, Row | str]]] = {}
    run, last = 0, None
    for number, row in enumerate(rows, line):
        key: Any = _key(row, same) or number
        run += key != last and not anywhere
        last = key
        found.setdefault((run, key), []).append((number, row))
    return [{"rows": some} for some in found.values()]


def _key(row: Row | str, same: tuple[str, ...]) -> str | None:
    """What must be equal in rows that are read as one; None for a row that is not read with others."""
    values = [row.get(name) for name in same] if isinstance(row, dict) else []
    names = all(v is None or isinstance(v, str | int) for one in values for v in (one if type(one) is list else [one]))
    return json.dumps(values) if names and any(values) else None  # the bytes of pictures are not compared


def _read(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    if block.format == "parquet":
        return _parquet_rows(block, columns)
    if block.format == "json":
        return _json_rows(block.file, block.same)
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
        if (value := value_at(row, name)) not in (None, "", []):
            return value
    raise SampleError(f"no {names[0]}")


def value_at(row: Any, name: str) -> Any:
    """The value of a column, or with dots in the name of a key in it: `json.title`. Of a list, that of each element."""
    if isinstance(row, list):
        return [value_at(one, name) for one in row]
    if not isinstance(row, dict):
        return None
    if name in row or "." not in name:
        return row.get(name)
    root, _, rest = name.partition(".")
    inner = row.get(root)
    return value_at(_row_of(inner.encode()) if isinstance(inner, str) else inner, rest)


def _column(name: str, columns: Sequence[str]) -> str:
    """The column of that name, or the one that the key is in."""
    return name if name in columns else name.partition(".")[0]


def _row_of(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "malformed JSON"
    return row if isinstance(row, dict) else "malformed JSON"


def _csv_row(header: tuple[str, ...], cells: list[str]) -> Row | str:
    if len(cells) != len(header):
        return "row with too many or too few cells"
    return dict(zip(header, cells, strict=True))


@functools.lru_cache(maxsize=2)
def _json_rows(file: Path, same: tuple[str, ...]) -> list[Row | str]:
    rows: list[Row | str] = [*read_json_list(file)]
    return _as_one(rows, same, 0, anywhere=True) if same else rows


@functools.lru_cache(maxsize=2)
def read_json_list(file: Path) -> list[Row]:
    """A JSON file that holds a list of objects. Raises UserError."""
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} is not a JSON list of objects")
    return rows


def _line_blocks(file: Path, kind: str, same: tuple[str, ...]) -> tuple[list[str], list[Block]]:
    """(columns, blocks) of a CSV or JSONL file, from one pass over it."""
    blocks: list[Block] = []
    columns: list[str] = []
    start = line = first = 0
    with open(file, "rb") as data:
        ends: Iterator[tuple[int, Any]] = _csv_ends(data, file) if kind == "csv" else _jsonl_ends(data)
        if kind == "csv":
            start, columns = next(ends, (0, []))
        for end, lines, rows in _cut(ends, tuple(columns), same):
            blocks.append(Block(file, kind, first, rows, start, end - start, tuple(columns), line, same))
            start, line, first = end, line + lines, first + rows
    if kind == "jsonl" and blocks:
        columns = _keys(_read(blocks[0], ()))
        if not columns:
            raise UserError(f"{file} is not JSONL: none of its first lines is a JSON object")
    return columns, blocks


def _cut(
    ends: Iterator[tuple[int, Any]], columns: tuple[str, ...], same: tuple[str, ...]
) -> Iterator[tuple[int, int, int]]:
    """(end, lines, rows) of blocks of LINES lines, or more where the last ones are read as one row."""
    last, end, lines, rows = None, 0, 0, 0
    for this_end, line in ends:
        key = _key(_csv_row(columns, line) if columns else _row_of(line), same) if same else None
        more = key is not None and key == last
        if lines >= LINES and not more:
            yield end, lines, rows
            lines = rows = 0
        last, end, lines, rows = key, this_end, lines + 1, rows + (not more)
    if lines:
        yield end, lines, rows


def _keys(rows: Sequence[Row | str]) -> list[str]:
    """The keys of all rows: JSON rows may omit keys without a value."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def _jsonl_ends(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The end of each line that is not empty, and the line."""
    place = 0
    for line in file:
        place += len(line)
        if line.strip():
            yield place, line


def _csv_ends(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The end of each row of a CSV file, the header's first, and its cells. A quoted cell may span lines."""
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            text = line.decode("utf-8" if place else "utf-8-sig", "replace")
            place += len(line)
            yield text

    try:
        for cells in csv.reader(lines()):  # reads exactly the lines of a row
            if cells:
                yield place, cells
    except csv.Error as error:
        raise UserError(f"{path} is not CSV after byte {place}: {error}") from error


def _open_parquet(file: Path) -> Any:
    with needs("reading parquet", "pyarrow>=18"):
        from pyarrow import parquet
    try:
        return parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise UserError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})") from error


def _parquet_blocks(file: Path, same: tuple[str, ...]) -> tuple[list[str], list[Block]]:
    with _open_parquet(file) as table:
        blocks, first, line = [], 0, 0
        columns = list(table.schema_arrow.names)
        for group in range(table.metadata.num_row_groups):
            lines = rows = table.metadata.row_group(group).num_rows
            block = Block(file, "parquet", first, rows, group, line=line, same=same)
            if paths := [name for name in same if name in columns and not _holds_files(table, name)]:
                rows = len(_as_one(_parquet_rows(block, tuple(paths)), same, line))
            if rows:
                blocks.append(replace(block, rows=rows))
            first, line = first + rows, line + lines
        return columns, blocks


def _holds_files(table: Any, name: str) -> bool:
    """True for a column of bytes, or of {bytes, path}: its values are not compared."""
    kind = str(table.schema_arrow.field(name).type)
    return "binary" in kind or "struct" in kind


def _parquet_rows(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    with _open_parquet(block.file) as table:
        names = table.schema_arrow.names
        present = sorted({_column(name, names) for name in columns} & set(names))
        try:
            return list(table.read_row_group(block.place, columns=present).to_pylist())
        except (ValueError, OSError):
            return ["damaged row group"] * block.rows
