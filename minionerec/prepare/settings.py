"""The flags of scripts/prepare_data.py. Only the standard library is imported."""

import re
from dataclasses import dataclass, fields
from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo

from minionerec.checkpoint import check_model
from minionerec.errors import InputError, Problems
from minionerec.flags import Check, Flags, above_zero, check_new_folder, flag, one_of, zero_or_more

LEVELS, CODES = 8, 65_536  # at most
COLLISIONS = ("move", "extend", "keep")
TEXTS = ("title", "description", "brand", "categories", "price")  # of an item
ROLES = ("user", "item", "time", "title", "description", "event", "rating")  # those with a flag that names their column


def _between(low: int, high: int) -> Check[int]:
    return lambda value: None if low <= value <= high else f"must be between {low} and {high}"


def _zone_of(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)  # not every system has a table of zones


def _zone(value: str) -> str | None:
    try:
        _zone_of(value)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        return "is no time zone of this system; give one such as UTC or Europe/Berlin"
    return None


def check_category(category: str) -> None:
    """Raises InputError for a category that cannot be part of a file name."""
    if not category.strip():
        raise InputError("--category is missing; say what the items are, such as Industrial_and_Scientific")
    if not re.fullmatch(r"\w[\w &+.-]*", category):
        raise InputError(
            f"--category {category!r}: is used in file names; write it with letters, digits, spaces and the characters "
            "_ & + . -"
        )


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(Flags):
    """What is read, how it is cleaned, and what IDs the items get."""

    interactions: str = flag("", "file of purchases, with a user, an item and a time per row.")
    items: str = flag("", "file of items, with an id, a title and optionally a description per row.")
    output_dir: str = flag("", "folder to write, in the layout of the release; it must not exist yet.")
    category: str = flag("", "what the items are, for file names and prompts, such as Industrial_and_Scientific.")
    user_column: str = flag("", "name of the column with the user, if it is not recognized.")
    item_column: str = flag(
        "", "name of the column with the item id, in both files or in one; or two names, for interactions,items."
    )
    time_column: str = flag("", "name of the column with the time: seconds or milliseconds since 1970, or a date.")
    title_column: str = flag("", "name of the column with the title.")
    description_column: str = flag("", "name of the column with the description.")
    delimiter: str = flag("", "what separates the columns of a text file, such as ; or ::, if it is not recognized.")
    no_header: bool = flag(
        False, "the first line of a text file without column names is a row; the columns are called 1, 2 and so on."
    )
    encoding: str = flag("", "encoding of text files that are not UTF-8, such as latin-1, cp1252 or gb18030.")
    time_format: str = flag(
        "", "how times are written, such as '%m/%d/%Y %H:%M' (as in datetime.strptime), or s, ms, us or ns since 1970."
    )
    time_zone: str = flag("UTC", "time zone of times that name none, and of start_date and end_date.", _zone)
    skip_bad_rows: bool = flag(
        False, "leave out rows that cannot be used, and say how many; they are refused otherwise."
    )
    events: str = flag("", "only these kinds of events, separated by commas, such as buy,cart.")
    event_column: str = flag("", "name of the column with the kind of event.")
    min_rating: float | None = flag(None, "only interactions with at least this rating.")
    rating_column: str = flag("", "name of the column with the rating.")
    drop_repeats: bool = flag(False, "count an item that is bought several times in a row only once.")
    session_gap: float = flag(
        0.0,
        "minutes without an interaction that end a session; each session then has its own history. 0: one history "
        "per user.",
        zero_or_more,
    )
    min_interactions: int = flag(
        5,
        "users and items with fewer interactions are dropped, until all have at least this many (k-core).",
        above_zero,
    )
    max_history: int = flag(10, "how many of the most recent items of a history are kept.", above_zero)
    start_date: str = flag("", "drop earlier interactions: a year, month or day, such as 2016-10.")
    end_date: str = flag("", "drop later interactions; the year, month or day itself is kept.")
    split: str = flag(
        "time",
        "time (the last 10% of all rows are for the test, the 10% before them for validation) or last (for each user, "
        "the last item is for the test, the one before it for validation).",
        lambda value: None if value in ("time", "last") else "must be time or last",
    )
    text_columns: str = flag(
        "title,description",
        "columns that the IDs are made from, separated by commas: title, description, brand, categories, price.",
        lambda value: None if set(value.split(",")) <= {*TEXTS} else f"must be some of {', '.join(TEXTS)}",
    )
    encoder: str = flag(
        "", "folder or hub name of a model that embeds titles and descriptions; by default TF-IDF with SVD."
    )
    embeddings: str = flag("", ".npy file with a row for every row of items (or add_items), in the same order.")
    purchase_share: float = flag(
        0.5,
        "how much of the IDs comes from items bought together in the training rows; the rest comes from the texts. "
        "0 for texts only.",
        lambda value: None if 0 <= value < 1 else "must be at least 0 and below 1",
    )
    levels: int = flag(3, "number of codes in a semantic ID.", _between(1, LEVELS))
    codes: int = flag(256, "size of the codebook of each level.", _between(2, CODES))
    collisions: str = flag(
        "move",
        "what to do with items that share an ID: move (to the nearest free last code), extend (by one more code) or "
        "keep.",
        one_of(*COLLISIONS),
    )
    seed: int = flag(
        42,
        "seed of every random choice; the same input and seed give the same files.",
        _between(0, 2**32 - LEVELS - 1),
    )
    add_items: str = flag(
        "", "file of new items, which get IDs from the codebooks of dataset; old items do not change."
    )
    dataset: str = flag(
        "",
        "folder that this script wrote, for add_items, or for interactions with old and new purchases; the new ones "
        "become rows of a file of their own.",
    )

    @property
    def columns(self) -> dict[str, str]:
        """role -> the column name that a flag gives, or ""."""
        return {role: getattr(self, f"{role}_column") for role in ROLES}

    @property
    def adds(self) -> bool:
        """Whether items or purchases are added to a data set."""
        return bool(self.add_items or self.dataset)

    @property
    def wanted_events(self) -> frozenset[str]:
        """The kinds of events that count; none for all."""
        return frozenset(filter(None, map(str.strip, self.events.split(","))))

    @property
    def zone(self) -> tzinfo:
        """Of times that name none."""
        return _zone_of(self.time_zone)

    def check(self, problems: Problems) -> None:
        check_new_folder(problems, self.output_dir)
        if self.encoder:
            check_model(problems, "encoder", self.encoder)
        if self.encoder and self.embeddings:
            problems.add("--encoder and --embeddings exclude each other; keep one")
        if self.adds:
            for one in fields(self):
                needs = next((name for name, group in FOR_ADDING.items() if one.name in group), "")
                if getattr(self, one.name) == one.default or (needs and getattr(self, needs)):
                    continue
                wrong = f": without --{needs} it does nothing" if needs else " is for a new data set"
                problems.add(f"--{one.name}{wrong}; the settings are those of --dataset")
            return
        problems.attempt(check_category, self.category)
        super().check(problems)
        self.check_columns(problems)

    def check_columns(self, problems: Problems) -> None:
        """Adds the columns of filters that are not there."""
        for name, needs in (("event_column", self.events), ("rating_column", self.min_rating is not None)):
            if getattr(self, name) and not needs:
                problems.add(
                    f"--{name}: without --{'events' if name == 'event_column' else 'min_rating'} it does nothing"
                )


# The flags that go with --dataset, by the flag that they need.
FOR_ADDING = {
    "output_dir": (
        *("add_items", "interactions", "dataset", "output_dir", "item_column"),
        *("delimiter", "no_header", "encoding", "skip_bad_rows"),
    ),
    "add_items": ("title_column", "description_column", "encoder", "embeddings"),
    "interactions": ("user_column", "time_column", "event_column", "rating_column", "time_format", "end_date"),
}
