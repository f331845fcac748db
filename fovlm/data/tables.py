"""The lists that data sets come with (CSV, JSON, JSONL, parquet), read a block of rows at a time. The door to pyarrow.

A block is what is cheap to read at once: a row group of a parquet file, some neighbouring lines of a text file. Blocks
are found by one pass over the files that keeps nothing but places, so a table of any size can be shuffled.
"""

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fovlm.errors import SampleError, UserError, did_you_mean

LINES = 64  # rows in a block of a text file: small blocks mix well, and any of them is a single read
FORMATS = {"parquet": "parquet", "csv": "csv", "jsonl": "jsonl", "json": "json"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """`rows` rows of a table from number `first` on; `place` and `length` are its bytes, or `place` its row group."""

    file: Path
    format: str  # of FORMATS, or "sidecar": one JSON file for each row, `names`
    first: int
    rows: int
    place: int = 0
    length: int = 0
    names: tuple[str, ...] = ()  # the columns of a CSV; the files of a sidecar block


def find_tables(where: Path, formats: tuple[str, ...]) -> list[Path]:
    """The tables at `where`, a file or a folder (parquet: in depth). Raises UserError when there are none."""
    kinds = " or ".join(f"*.{name}" for name in formats)
    if where.is_file():
        if where.suffix[1:].lower() not in formats:
            raise UserError(f"{where} is no table that this source has (wanted: {kinds})")
        return [where]
    if not where.is_dir():
        near = did_you_mean(where.name, (p.name for p in where.parent.iterdir())) if where.parent.is_dir() else ""
        raise UserError(f"no such file or folder: {where}{near}")
    for name in formats:
        if found := _tables_in(where, name):
            return found
    raise UserError(f"{where} holds no {kinds}: give the folder that does, or the file itself")


def refuse_twice(tables: list[Path], raw: Path, whole: str) -> None:
    """`whole` is a file or folder that has all rows of the others. Raises UserError when it is read beside them."""
    within = {table: table.relative_to(raw).parts for table in tables}
    parts = [table for table in tables if whole not in within[table]]
    if parts and len(parts) < len(tables):
        place = next(names for names in within.values() if whole in names)
        at = raw.joinpath(*place[: place.index(whole) + 1])
        raise UserError(f"{parts[0]} has rows that {at} has too, and each would come twice: give {at} as IN")


def _tables_in(folder: Path, name: str) -> list[Path]:
    if name == "parquet":
        return sorted(folder.rglob("*.parquet"))
    found = sorted(folder.glob(f"*.{name}"))
    return [file for file in found if name != "json" or _is_list(file)]  # others are beside a video, or about something


def _is_list(file: Path) -> bool:
    with open(file, "rb") as data:
        return data.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def blocks_of(file: Path, needs: tuple[tuple[str, ...], ...]) -> list[Block]:
    """The blocks of one table. `needs` are the columns that it must have, each with its other names.

    Raises UserError naming the file, the missing column and those that are there.
    """
    try:
        kind = FORMATS[file.suffix[1:].lower()]
        if kind == "parquet":
            columns, blocks = _parquet_blocks(file)
        elif kind == "json":
            rows = _whole_json(file)
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
    """One JSON file beside each video, as video2dataset writes them. Empty when there are none, or a table as well.

    video2dataset also leaves NAME.parquet and NAME_stats.json beside its folders: an account of the download.
    """
    if not folder.is_dir() or any(_tables_in(folder, name) for name in formats if name != "parquet"):
        return []
    files = [p for p in folder.rglob("*.json") if not p.name.endswith("_stats.json")]
    if (
        "parquet" in formats
        and _tables_in(folder, "parquet")
        and not any(p.with_suffix(".mp4").is_file() for p in files)
    ):
        return []
    names = sorted(str(p.relative_to(folder)) for p in files)
    starts = range(0, len(names), LINES)
    return [Block(folder, "sidecar", i, len(part := names[i : i + LINES]), names=tuple(part)) for i in starts]


def read_block(block: Block, columns: tuple[str, ...]) -> list[Row | str]:
    """The rows of a block; a cause in place of a row that cannot be read. Of parquet only `columns` are read."""
    if block.format == "parquet":
        return _parquet_rows(block, columns)
    if block.format == "json":
        return list(_whole_json(block.file))
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
    """The first of these columns that the row has a value in. Raises BadSample."""
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
        return "a row with too many or too few cells"
    return dict(zip(header, cells, strict=True))


def _header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines), [])


@functools.lru_cache(maxsize=2)
def _whole_json(file: Path) -> list[Row]:
    """A JSON list of objects; it has to be read whole. Raises UserError."""
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
    rows = place = 0
    with open(file, "rb") as data:
        ends = _csv_ends(data, file) if kind == "csv" else _jsonl_ends(data)
        if kind == "csv":
            columns = _header(file)
            place = next(ends, 0)
        begun = place
        for end in ends:
            rows += 1
            if rows % LINES == 0:
                blocks.append(Block(file, kind, rows - LINES, LINES, begun, end - begun, tuple(columns)))
                begun = end
            place = end
    if rows % LINES:
        blocks.append(Block(file, kind, rows - rows % LINES, rows % LINES, begun, place - begun, tuple(columns)))
    if kind == "jsonl" and blocks:
        columns = _keys(read_block(blocks[0], ()))
        if not columns:
            raise UserError(f"{file} is not JSONL: none of its first lines is a JSON object")
    return columns, blocks


def _keys(rows: Sequence[Row | str]) -> list[str]:
    """What rows of JSON have between them: one without a value may leave out its key."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def _jsonl_ends(file: BinaryIO) -> Iterator[int]:
    """Where each line that is not empty ends."""
    place = 0
    for line in file:
        place += len(line)
        if line.strip():
            yield place


def _csv_ends(file: BinaryIO, path: Path) -> Iterator[int]:
    """Where each row of a CSV file ends, the header's first. A quoted cell may span lines."""
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            place += len(line)
            yield line.decode("utf-8", "replace")

    try:
        for cells in csv.reader(lines()):  # the reader takes as many lines as a row has, and no more
            if cells:
                yield place
    except csv.Error as error:
        raise UserError(f"{path} is not CSV after byte {place}: {error}") from error


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'fovlm[data]' (or pyarrow)") from None
    return parquet


def _open_parquet(file: Path) -> Any:
    parquet = _parquet()
    try:
        return parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise UserError(f"{file} is no readable parquet file ({str(error).splitlines()[0]})") from error


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
        there = [name for name in columns if name in table.schema_arrow.names]
        try:
            return list(table.read_row_group(block.place, columns=there).to_pylist())
        except (ValueError, OSError):
            return ["damaged row group"] * block.rows
