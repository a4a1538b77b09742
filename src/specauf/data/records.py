"""The raw records of corpus files: JSON arrays, JSONL and parquet, whole or cut.

Nothing is lost silently: each record is counted, and bytes that hold no whole record are named in a warning.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specauf.strict import UserError, counted

if TYPE_CHECKING:
    from specauf.data.sources import Ledger

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
"""Of the files that are read from a directory."""
PACKED = (".gz", ".zst", ".zip", ".bz2", ".xz")
CHUNK = 1 << 23
_SEPARATOR = re.compile(r"[\s,]*")


def corpus_files(path: Path) -> list[Path]:
    """The file `path`, or the files of a corpus that lie in the directory `path`, by name.

    Raises `UserError` when there are none.
    """
    if path.is_dir():
        there = sorted(path.glob("[!.]*"))
        if packed := [p.name for p in there if p.suffix.lower() in PACKED]:
            raise UserError(f"{path} holds compressed files ({', '.join(packed[:3])}): unpack them, or take them away")
        found = [p for p in there if p.suffix.lower() in SUFFIXES and not p.is_dir()]
        if broken := [p.name for p in found if not p.is_file()]:
            raise UserError(f"{path} holds {', '.join(broken[:3])}, which cannot be read: a link to nothing?")
        if found:
            return found
        raise UserError(f"{path} is a directory, and holds neither rollouts nor {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file" if path.exists() else f"no such data file: {path}")
    return [path]


def read_records(path: Path, ledger: Ledger) -> Iterator[Any]:
    """The raw records of `corpus_files(path)`, each counted in `ledger.records_in`, through all the files.

    An array cut mid-record is read up to its last whole record, with a warning that says how many bytes were lost;
    a line that is not JSON is dropped and counted. Raises `UserError` as `corpus_files` does, for a compressed file, and
    for parquet when pyarrow is not installed.
    """
    files = corpus_files(path)
    if other := sorted({p.name for p in path.glob("[!.]*")} - {p.name for p in files}) if path.is_dir() else ():
        ledger.warnings.append(f"{path.name}: not read: {', '.join(other)}")
    for file in files:
        ledger.file = (file.name, ledger.records_in) if len(files) > 1 else ("", 0)
        for record in _records(file, ledger):
            ledger.records_in += 1
            yield record


def _records(path: Path, ledger: Ledger) -> Iterator[Any]:
    with path.open("rb") as file:
        head = file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise UserError(f"{path} is compressed: unpack it first (gunzip, unzstd, unzip)")
    if head.startswith(b"PAR1"):
        return _read_parquet(path)
    if head.startswith(b"[") and path.suffix.lower() not in (".jsonl", ".ndjson"):
        return _read_array(path, ledger)
    return _read_lines(path, ledger)


def _read_array(path: Path, ledger: Ledger) -> Iterator[Any]:
    # surrogateescape keeps undecodable bytes countable; `normalise` repairs those that are inside a record.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan, total = json.JSONDecoder().raw_decode, path.stat().st_size
    with path.open("rb") as file:
        text, size, whole = decode(file.read(CHUNK)), CHUNK, 0
        at, closed = text.index("[") + 1, False
        while not closed:
            at = _SEPARATOR.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", at):
                at, closed = at + 1, True
                continue
            try:
                record, at = scan(text, at)
            except json.JSONDecodeError:
                chunk = file.read(size)
                text, at = text[at:] + decode(chunk, final=not chunk), 0
                size *= 2  # so that a record longer than a chunk is scanned a logarithmic number of times
                if not chunk:
                    break
            except (RecursionError, ValueError):
                break  # nested too deeply, or a number of thousands of digits: no way past it
            else:
                yield record
                whole, size = whole + 1, CHUNK
        rest = text[at:].encode("utf-8", "surrogateescape") + file.read()
    if not closed:
        ledger.warnings.append(
            f"{path.name}: the JSON array is cut or broken in record {whole + 1:,}, at byte {total - len(rest):,}; "
            f"{whole:,} whole records were read, the last {len(rest):,} bytes of {total:,} are lost"
        )
    elif rest.strip():
        ledger.warnings.append(f"{path.name}: {len(rest):,} bytes after the end of the JSON array are ignored")


def _read_lines(path: Path, ledger: Ledger) -> Iterator[Any]:
    bad, first, last, lost = 0, 0, 0, 0
    number, records, cut = 0, 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                bad, first, last, lost = bad + 1, first or number, number, len(line)
                cut = not line.endswith(b"\n")
                ledger.records_in += 1
                ledger.drop("not JSON")
                continue
            records += isinstance(record, dict)
            yield record
    if bad and not records:
        ledger.warnings.append(f"{path.name}: no line is a record. A single JSON object? Give an array or JSONL")
        return
    if cut:
        ledger.warnings.append(f"{path.name}: the last line ({last:,}) is cut; its {lost:,} bytes are lost")
        bad -= 1
    if bad:
        are = "is" if bad == 1 else "are"
        ledger.warnings.append(f"{path.name}: {counted(bad, 'lines')} {are} not JSON, the first is line {first:,}")


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'pyarrow>=18'") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
