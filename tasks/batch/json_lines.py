"""JSON lines as text: every value as it is written, numbers included, since a parser would change their digits.

Polars reads `1.10` as the text "1.1", and 9007199254740993.0 as another number. So each number is put in quotes before
it is read: a string is kept to the letter. Bytes are found by bit masks, 64 of them a word, as simdjson does.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_NUMBER_BYTES = b"0123456789+-.eE"
_NUMBER = r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?$"
_NESTED = r"^[\[{]"
_QUOTE, _BACKSLASH, _COLON = b'"\\:'
# What a byte may be to this module: part of a number, a quote, or neither.
_PART, _MARK = 1, 2
_CLASSES = bytes(_PART if at in _NUMBER_BYTES else _MARK if at == _QUOTE else 0 for at in range(256))
_BEGINS = np.array([at in b"-0123456789" for at in range(256)])
_BLANK = np.array([at in b" \t\r\n" for at in range(256)])
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHIFTS = [np.uint64(shift) for shift in (1, 2, 4, 8, 16, 32)]
_LAST = np.uint64(63)


class NotJsonLines(ValueError):
    """Bytes that are not one JSON object a line."""


class Number(str):
    """A number of JSON as it is written."""

    __slots__ = ()


def parse_lines(block: bytes, types: dict[str, pl.DataType], *, is_valid: bool = False) -> pl.DataFrame:
    """Return lines of JSON objects as a table of text columns, or columns of lists of text.

    Strings are what they stand for; numbers, booleans, objects and arrays are the text that is written. A field that a
    line lacks, or that is null, is null. Of a name that stands twice in an object the first counts.

    Args:
        block: Whole lines.
        types: Text, or lists of text, by the names of the fields.
        is_valid: Whether `read_object` has read each line: what it refuses is not looked for again.

    Raises:
        NotJsonLines: A line is no JSON object.
    """
    try:
        frame = pl.read_ndjson(io.BytesIO(quote_numbers(block, is_valid=is_valid)), schema=types)
    except pl.exceptions.PolarsError as error:
        raise NotJsonLines(str(error).splitlines()[0]) from error
    if not is_valid:
        _refuse_lone_surrogates(block)
    return _with_nested_text(frame, block)


def parse_fields(block: bytes, types: dict[str, pl.DataType], *, is_valid: bool = False) -> pl.DataFrame:
    """Return lines of JSON objects as `parse_lines` does, where a name may be the path of a field in an object.

    In each line a field whose own name is that path goes before it. Raises NotJsonLines.
    """
    paths = tuple(name for name in types if "." in name)
    if not paths:
        return parse_lines(block, types, is_valid=is_valid)
    structs = None if _holds_dots(block, paths) else _make_structs(types)
    if structs is not None:
        # Polars gives up where an object is expected and another value found. Lines that are no JSON are refused below.
        with suppress(NotJsonLines):
            nested = parse_lines(block, structs, is_valid=is_valid)
            frame = pl.DataFrame([_take_field(nested, name) for name in types])
            if not any(frame[name].str.contains(_NESTED).any() for name in paths if types[name] == pl.String):
                return frame
    frame = parse_lines(block, types, is_valid=is_valid)
    found = (find_written(line, paths) for line in block.split(b"\n") if line.strip())
    flat = (b",".join(json.dumps(name).encode() + b":" + value for name, value in each.items()) for each in found)
    lines = b"\n".join(b"{" + each + b"}" for each in flat)
    below = parse_lines(lines, {name: types[name] for name in paths}, is_valid=True)
    return frame.with_columns(below.get_columns())


def _holds_dots(block: bytes, paths: Sequence[str]) -> bool:
    """Return whether lines may hold a name with a dot in it that is a part of a path, or the whole of one."""
    parts = [path.split(".") for path in paths]
    spans = ((each, first, last) for each in parts for first, last in itertools.combinations(range(len(each) + 1), 2))
    names = {".".join(each[first:last]) for each, first, last in spans if last - first > 1}
    if b"\\" in block:
        return any(re.search(_spelled(name), block) for name in names)
    return any(name.encode() in block for name in names)


def _make_structs(types: dict[str, pl.DataType]) -> dict[str, Any] | None:
    """Return the types by the first field of each path; None where one path ends in what another leads through."""
    found: dict[str, Any] = {}
    for name, kind in types.items():
        *heads, last = name.split(".")
        within = found
        for head in heads:
            within = within.setdefault(head, {})
            if not isinstance(within, dict):
                return None
        if last in within:
            return None
        within[last] = kind
    return {name: _make_struct(each) for name, each in found.items()}


def _make_struct(kind: Any) -> Any:
    return pl.Struct({name: _make_struct(each) for name, each in kind.items()}) if isinstance(kind, dict) else kind


def _take_field(frame: pl.DataFrame, path: str) -> pl.Series:
    first, *others = path.split(".")
    column = frame[first]
    for name in others:
        column = column.struct.field(name)
    return column.alias(path)


def quote_numbers(block: bytes, *, is_valid: bool = False) -> memoryview:
    """Return whole lines of JSON with every number that is a value in quotes.

    What is no JSON stays none: a number that JSON does not know, or that stands for a name, is left as it is. With
    `is_valid`, which says that all of it is JSON, there is nothing to look for.
    """
    starts, stops = _find_numbers(block)
    if not is_valid:
        starts, stops = _only_values(block, starts, stops)
    edges = np.empty(2 * len(starts) + 2, dtype=np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, stops, len(block)
    pieces = _between(block, edges, pa.large_binary())
    listed = pa.LargeListArray.from_arrays(pa.array([0, len(pieces)]), pieces)
    return memoryview(pc.binary_join(listed, pa.scalar(b'"', pieces.type))[0].as_buffer())


def _between(block: bytes, edges: Positions, kind: pa.DataType) -> pa.Array:
    """Return the bytes between each two edges, as views of the block."""
    return pa.Array.from_buffers(kind, len(edges) - 1, [None, pa.py_buffer(edges), pa.py_buffer(block)])


def _find_numbers(block: bytes) -> tuple[Positions, Positions]:
    """Return where the numbers of a block begin and end, if it is JSON."""
    bytes_n = np.frombuffer(block, dtype=np.uint8)
    classes_n = np.frombuffer(block.translate(_CLASSES), dtype=np.uint8)
    quotes_n = classes_n == _MARK
    if b"\\" in block:
        quotes_n[_escaped(bytes_n)] = False
    parts = _packed(classes_n == _PART) & ~_inside_quotes(_packed(quotes_n))
    shifted = parts << np.uint64(1)
    shifted[1:] |= parts[:-1] >> _LAST
    edges = np.flatnonzero(np.unpackbits((parts ^ shifted).view(np.uint8), bitorder="little"))
    if len(edges) % 2:
        edges = np.append(edges, len(block))
    starts, stops = edges[::2], edges[1::2]
    # "e" is part of true and false too, but begins no number.
    begins_n = _BEGINS[bytes_n[starts]]
    return starts[begins_n], stops[begins_n]


def _only_values(block: bytes, starts: Positions, stops: Positions) -> tuple[Positions, Positions]:
    if not len(starts):
        return starts, stops
    edges = np.empty(2 * len(starts), dtype=np.int64)
    edges[::2], edges[1::2] = starts, stops
    numbers = _between(block, edges, pa.large_string()).take(pa.array(np.arange(0, len(edges), 2)))
    tokens = pl.Series(numbers, dtype=pl.String)
    good_n = tokens.str.contains(_NUMBER).to_numpy() & ~_before_colon(block, stops)
    return starts[good_n], stops[good_n]


def _before_colon(block: bytes, stops: Positions) -> npt.NDArray[np.bool_]:
    """Return which positions have a colon as their next byte, blanks left out."""
    bytes_n = np.frombuffer(block + b"\n", dtype=np.uint8)
    at_n = stops.copy()
    blank = np.flatnonzero(_BLANK[bytes_n[at_n]])
    while len(blank):
        at_n[blank] += 1
        blank = blank[at_n[blank] < len(block)]
        blank = blank[_BLANK[bytes_n[at_n[blank]]]]
    return np.asarray(bytes_n[np.minimum(at_n, len(block))] == _COLON)


def _escaped(bytes_n: npt.NDArray[np.uint8]) -> Positions:
    """Return the positions of bytes that a backslash stands for: after an odd number of them."""
    backslashes = np.flatnonzero(bytes_n == _BACKSLASH)
    begins = np.append(True, backslashes[1:] != backslashes[:-1] + 1)
    first = np.maximum.accumulate(np.where(begins, backslashes, 0))
    escaped = backslashes[(backslashes - first) % 2 == 0] + 1
    return np.asarray(escaped[escaped < len(bytes_n)])


def _packed(mask_n: npt.NDArray[np.bool_]) -> Words:
    packed = np.packbits(mask_n, bitorder="little")
    return np.concatenate([packed, np.zeros(-len(packed) % 8, dtype=np.uint8)]).view(np.uint64)


def _inside_quotes(quotes: Words) -> Words:
    """Return the bits from each opening quote up to its closing one: each is the parity of the quotes up to it."""
    for shift in _SHIFTS:
        quotes = quotes ^ (quotes << shift)
    carried = np.zeros_like(quotes)
    carried[1:] = np.uint64(0) - np.bitwise_xor.accumulate(quotes >> _LAST)[:-1]
    return quotes ^ carried


def read_object(line: bytes) -> Any:
    """Return one JSON value; where it has numbers that no float can hold, each is a Number. Raises NotJsonLines."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            found = json.loads(line.decode(), parse_int=Number, parse_float=Number, parse_constant=_refuse_constant)
            json.dumps(found, ensure_ascii=False).encode()  # which half of a character can't be
        except (ValueError, RecursionError):
            raise NotJsonLines(str(error)) from error
        return found


def _refuse_constant(text: str) -> None:
    message = f"{text} is no number of JSON"
    raise ValueError(message)


def _refuse_lone_surrogates(block: bytes) -> None:
    """Refuse half of a character: polars reads it as the character zero."""
    if b"\\u" not in block or not _SURROGATE.search(block):
        return
    for line in block.split(b"\n"):
        if _SURROGATE.search(line):
            read_object(line)


def _with_nested_text(frame: pl.DataFrame, block: bytes) -> pl.DataFrame:
    """Return a table whose objects and arrays are the text that is written, where polars has rewritten them."""
    texts = [name for name, kind in frame.schema.items() if kind == pl.String]
    if b"[" not in block and block.count(b"{") == frame.height:
        return frame
    lines: list[bytes] = []
    for name in texts:
        nested = np.flatnonzero(frame[name].str.contains(_NESTED).fill_null(value=False).to_numpy())
        if len(nested):
            lines = lines or [line for line in block.split(b"\n") if line.strip()]
            values = frame[name].to_list()
            for row in nested.tolist():
                written = written_values(lines[row], [name])[name]
                # A string may begin with a bracket too: it stands for itself.
                values[row] = written.decode() if written[:1] in (b"[", b"{") else values[row]
            frame = frame.with_columns(pl.Series(name, values, dtype=pl.String))
    return frame


def written_values(line: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """Return the values of a JSON object's fields as they are written, by the names of those that it has.

    The line must be one JSON object. Of a name that stands twice the first counts. Raises NotJsonLines where its values
    are nested too deeply.
    """
    try:
        return _scan_object(line.decode(), set(names))
    except RecursionError as error:
        message = "values are nested too deeply"
        raise NotJsonLines(message) from error


def find_written(line: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return values of a JSON object as `written_values` does, of fields in objects within it too, by their paths."""
    below = _split_paths(names)
    written = written_values(line, [*names, *below])
    found = {name: written[name] for name in names if name in written}
    for head, rests in below.items():
        if written.get(head, b"").startswith(b"{"):
            found = {f"{head}.{rest}": value for rest, value in find_written(written[head], rests).items()} | found
    return found


@functools.lru_cache(maxsize=256)
def _split_paths(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return what may follow each field that names may begin with: it may end at any of their dots."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        for at in (at for at, mark in enumerate(name) if mark == "."):
            found[name[:at]] = (*found.get(name[:at], ()), name[at + 1 :])
    return found


def _scan_object(text: str, names: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    at = _next_mark(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _SCANNER.scan_once(text, at)
        start = _next_mark(text, _next_mark(text, at) + 1)
        _, stop = _SCANNER.scan_once(text, start)
        if name in names and name not in found:
            found[name] = text[start:stop].encode()
        at = _next_mark(text, stop)
        if text[at] == ",":
            at = _next_mark(text, at + 1)
    return found


# Integers stay text: Python refuses to make numbers of thousands of digits.
_SCANNER: Any = json.JSONDecoder(parse_int=str, parse_float=str)
_BLANKS = re.compile(r"[ \t\r\n]*")


def _next_mark(text: str, at: int) -> int:
    """Return the place of the next character that is no blank."""
    return _BLANKS.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing at all, too


def find_fields(block: bytes, names: Sequence[str]) -> set[str]:
    """Return which names or paths are those of fields in whole lines of JSON, however they are written.

    Lines that can't have a name, by their bytes, are not parsed.
    """
    return {name for name in names if _has_field(block, name)}


def _has_field(block: bytes, name: str) -> bool:
    at = 0
    heads = [name, *_split_paths((name,))]
    pattern = re.compile(b"|".join(_spelled(head) for head in heads))
    while (match := pattern.search(block, at)) is not None:
        start, stop = block.rfind(b"\n", 0, match.start()) + 1, block.find(b"\n", match.end())
        stop = len(block) if stop < 0 else stop
        # It may be a field of an object within the object, or the end of a longer name.
        if name in find_written(block[start:stop], (name,)):
            return True
        at = stop
    return False


def _spelled(name: str) -> bytes:
    """Return a pattern of a name in quotes before a colon, with any of its characters escaped."""
    return b'"' + b"".join(_spelling(each) for each in name) + rb'"[ \t\r]*:'


_SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}


def _spelling(character: str) -> bytes:
    units = character.encode("utf-16-be").hex()
    escaped = "".join(rf"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
    forms = [re.escape(character.encode()), f"(?i:{escaped})".encode()]
    if character in _SHORT:
        forms.append(re.escape(f"\\{_SHORT[character]}".encode()))
    return b"(?:" + b"|".join(forms) + b")"
