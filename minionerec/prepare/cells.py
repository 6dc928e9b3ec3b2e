"""What a cell of a raw file means: an id, a time, a rating, a text. Each is read, or refused; nothing is guessed."""

import html
import math
import re
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, tzinfo
from decimal import Decimal
from functools import lru_cache

import numpy as np

from minionerec.data.files import is_text, present

LATEST = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001}  # of numbers as times -> microseconds


class Rounded(float):
    """A number that lost digits when it was stored as a float."""


def whole(value: float, bits: int = 53) -> float:
    """A float as it is, or Rounded if it is too large to tell whole numbers apart; `bits` of its mantissa."""
    return Rounded(value) if abs(value) >= 2**bits else value


_FLOAT_ID = re.compile(r"-?\d(?:[.,]\d+)?[eE]\+\d+|-?(?:0|[1-9]\d*)(?:\.0+|,0)")


def _text_id(value: str) -> str | None:
    """An id that is text. A missing id makes pandas write whole numbers as 7.0, and large ones as 1.2e+17; where
    decimals have a comma, as 7,0 and 1,2e+17."""
    value = present(value)
    if is_shortened(value):
        return None
    if ("." in value or "+" in value or "," in value) and _FLOAT_ID.fullmatch(value):
        return identifier(float(value.replace(",", ".")))
    return value if value and is_text(value) else None


def identifier(value: object) -> str | None:
    """A user or item id as text, or None if the value is not an id. A whole float is an integer that lost its type,
    unless it is so large that it lost digits too."""
    if isinstance(value, str):
        return _text_id(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and not isinstance(whole(value), Rounded) else None
    if isinstance(value, Decimal):
        return str(int(value)) if value.is_finite() and value == value.to_integral_value() else None
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes) and value:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return value.hex()
        return _text_id(text) if text.isprintable() else value.hex()
    return None


def not_an_id(role: str, cell: object) -> str:
    """What is wrong with a cell that should be an id."""
    text = cell.strip() if isinstance(cell, str) else ""
    is_large = isinstance(cell, float) and math.isfinite(cell) and abs(cell) >= 2**11 and cell.is_integer()
    if is_large or re.fullmatch(r"-?\d([.,]\d+)?[eE]\+\d+|-?\d+(\.0+|,0)", text):
        lost = "a spreadsheet shortened it" if is_shortened(text) else "it was stored as a float"
        return f"lost digits when {lost}; write ids as text or as whole numbers"
    return f"expected {'an' if role == 'item' else 'a'} {role} id, text or a whole number"


def is_shortened(cell: object) -> bool:
    """Whether a cell is a number as a spreadsheet saves a long one, such as 1.53834E+12, or 1,53834E+12 where decimals
    have a comma: its last digits are lost. In Python and R the e is small."""
    if not isinstance(cell, str) or "E+" not in cell:
        return False
    return bool(re.fullmatch(r"-?\d(?:[.,]\d+)?E\+(?:0\d|1[0-5])", cell.strip()))


def microseconds(value: object, zone: tzinfo = UTC) -> int | None:
    """A time in microseconds since 1970 (UTC), or None if the value is not a time between 1970 and 2100.

    Numbers below 1e11 are seconds, below 1e14 milliseconds, below 1e17 microseconds, above that nanoseconds, so the
    order of the values is kept. Text is such a number or an ISO 8601 date, in `zone` unless it names another one.
    """
    if isinstance(value, str):
        text = value
        if is_shortened(text):
            return None
        if "_" in text:  # Python takes 2018_10_14 for a number
            return _iso(text, zone)
        try:
            value = float(text)
        except ValueError:
            return _iso(text, zone)
    if isinstance(value, date):
        return _moment(value, zone)
    if isinstance(value, Decimal) and value.is_finite():
        value = float(value)
    if isinstance(value, (bool, Rounded)) or not isinstance(value, (int, float)) or not 0 <= value < 1e20:
        return None
    scale = 1e6 if value < 1e11 else 1e3 if value < 1e14 else 1 if value < 1e17 else 1e-3
    return _in_range(round(value * scale))


@lru_cache(maxsize=1 << 16)  # dates without a time of day repeat
def _iso(text: str, zone: tzinfo) -> int | None:
    text = text.strip()
    bare = re.sub(r" (?:UTC|GMT)$", "", text)
    try:
        return _moment(datetime.fromisoformat(re.sub(r" (?=[+-]\d\d:?\d\d$)", "", bare)), zone if bare == text else UTC)
    except ValueError:
        return None


def _moment(value: date, zone: tzinfo) -> int | None:
    when = value if isinstance(value, datetime) else datetime.combine(value, time())
    try:
        return _in_range(round((when if when.tzinfo else when.replace(tzinfo=zone)).timestamp() * 1e6))
    except (OverflowError, ValueError):
        return None


def _in_range(moment: int) -> int | None:
    return moment if 0 <= moment < LATEST else None


def _not_plain(cell: object) -> bool:
    """Whether a cell is text that `microseconds` reads otherwise than Python does."""
    return (isinstance(cell, str) and "_" in cell) or is_shortened(cell)


def times_of(cells: Sequence[object], form: str, read: Callable[[object], int | None]) -> list[int | None]:
    """The times of cells, by the `time_reader` of a form; numbers at once where there is no form."""
    types = {*map(type, cells)}
    if not form and types <= {str, int, float} and not (str in types and any(map(_not_plain, cells))):
        try:
            values = np.asarray(cells, object).astype(np.float64)
        except (ValueError, OverflowError):
            values = np.full(1, np.nan)
        if ((values >= 0) & (values < 1e20)).all():  # False for NaN
            scales = np.select([values < 1e11, values < 1e14, values < 1e17], [1e6, 1e3, 1.0], 1e-3)
            moments = np.rint(values * scales)
            if (moments < LATEST).all():
                return moments.astype(np.int64).tolist()
    return list(map(read, cells))


def time_reader(form: str, zone: tzinfo = UTC) -> Callable[[object], int | None]:
    """What reads times as `microseconds` does, or, where a form is given, in this form only: s, ms, us or ns for
    numbers since 1970, else as datetime.strptime has it."""
    if not form:
        return lambda value: microseconds(value, zone)
    if form in UNITS:

        def number(value: object) -> int | None:
            try:
                amount = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                return None
            if isinstance(value, (bool, Rounded)) or is_shortened(value) or not math.isfinite(amount):
                return None
            return _in_range(round(amount * UNITS[form]))

        return number

    @lru_cache(maxsize=1 << 16)
    def parsed(text: str) -> int | None:
        try:
            return _moment(datetime.strptime(text, form), zone)
        except (ValueError, OverflowError, re.error):
            return None

    def written(value: object) -> int | None:
        if isinstance(value, float) and value.is_integer() and not isinstance(value, Rounded):
            value = int(value)
        return parsed(str(value).strip()) if isinstance(value, (str, int)) and not isinstance(value, bool) else None

    return written


# Dates that are written as one number, which is also a number of seconds or milliseconds since 1970: the form, and the
# microseconds that such a number is read as.
_AS_NUMBERS = {
    "%Y": (4, 1_000_000),
    "%Y%m": (6, 1_000_000),
    "%Y%m%d": (8, 1_000_000),
    "%Y%m%d%H": (10, 1_000_000),
    "%Y%m%d%H%M": (12, 1_000),
}
SINCE_1973 = 10**14  # microseconds: times that count from the start of a log, and not from 1970, are below it


class DatesAsNumbers:
    """Notices times such as 20181014, a date, that were read as seconds since 1970."""

    def __init__(self) -> None:
        self.num_times, self.latest = 0, 0
        self.count = dict.fromkeys(_AS_NUMBERS, 0)
        self.first: dict[str, object] = {}

    def see(self, cells: Sequence[object], times: np.ndarray) -> None:
        """Looks at the cells of times [n] that were read as `microseconds` does."""
        self.num_times += len(times)
        self.latest = max(self.latest, int(times.max(initial=0)))
        for form, (digits, scale) in _AS_NUMBERS.items():
            low, high = int("197001010000"[:digits]) * scale, int("209912312359"[:digits]) * scale
            for place in np.flatnonzero((times >= low) & (times <= high)).tolist():
                text = re.sub(r"\.0+$", "", str(cells[place]).strip())
                if len(text) == digits and text.isdigit() and _is_date(text, form):
                    self.count[form] += 1
                    self.first.setdefault(form, cells[place])

    def problem(self) -> str | None:
        """What is wrong, if all times look like dates, or some do where the others are of this century."""
        for form, count in self.count.items():
            if count and (count == self.num_times or self.latest >= SINCE_1973):
                which = "all times are" if count == self.num_times else f"{count:,} of {self.num_times:,} times are"
                return (
                    f"{which} numbers that look like dates, such as {self.first[form]!r}; give --time_format "
                    f"{form}, or --time_format s (or ms, us, ns) if they count from 1970"
                )
        return None


@lru_cache(maxsize=1 << 16)
def _is_date(text: str, form: str) -> bool:
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def number_of(value: object) -> float | None:
    """A cell as a finite number, or None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


# Also as SAP and Excel write -3: 3-, (3); and as Oracle writes -0.5: -.5
_AMOUNT = re.compile(r"(?P<minus>[-\u2212]\s*)?\(?[.,]?\d[\d.,\s]*(?P<after>-|\))?")


def sign_of(value: object) -> int | None:
    """The sign of a number: -1, 0 or 1; None if the cell is not a number. A text may use a comma for decimals or for
    thousands, since only its sign is read."""
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value.strip())
        if not found:
            return None
        return (-1 if found["minus"] or found["after"] else 1) if re.search("[1-9]", value) else 0
    number = number_of(value)
    return None if number is None else (number > 0) - (number < 0)


_ENTITY = re.compile(r"&#?\w+;")  # Python's unescape also takes the first letters of `&notebooks` for one
_TAG = re.compile(r"<(?:/?[a-zA-Z]|[!|])[^<>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def text_of(value: object, depth: int = 2, separator: str = " ") -> str | None:
    """A cell as one line of text without markup, empty if it stands for a missing one or shows nothing, as a lone
    zero-width space; None if it is neither text nor a list of texts.

    Markup is what stands between < and > and looks like a tag, a SID or a control token: other programs that read the
    files may take `<a_1>` and `<|im_end|>` for tokens. Our own take all that is left as text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple)) and depth:
        parts = [text_of(part, depth - 1, separator) for part in value]
        return None if None in parts else separator.join(part for part in parts if part)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    if not isinstance(value, str):
        return None
    if "&" in value:
        value = _ENTITY.sub(lambda entity: html.unescape(entity.group()), value)
    if "<" in value:
        value = _TAG.sub(" ", value)
    if not value.isascii():  # an escape in JSON can stand for half a surrogate pair
        value = value.encode("utf-8", "replace").decode("utf-8")
    text = present(" ".join(_CONTROL.sub(" ", value).split()))
    return text if text.isprintable() or any(map(str.isprintable, text.replace(" ", ""))) else ""


def is_empty(value: object) -> bool:
    """Whether a cell says nothing."""
    if isinstance(value, str):
        return not present(value)
    return value is None or value != value or (isinstance(value, (list, tuple, dict, bytes)) and not value)
