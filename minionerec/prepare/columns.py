"""Which column of a raw file is the user, the item, the time and so on, by its name."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minionerec.data.files import shorten
from minionerec.errors import InputError

if TYPE_CHECKING:
    from minionerec.prepare.formats import Source

# Names that a column may have, in lower case without spaces, underscores and RecBole's types (`user_id:token`). Those
# of the published Amazon Reviews of 2018 and 2023 are included.
COLUMNS = {
    role: names.split()
    for role, names in {
        "user": "user userid uid username reviewerid customer customerid visitorid",
        "item": "item itemid iid product productid asin parentasin sku article articleid movieid bookid businessid "
        "artistid trackid gameid",
        "time": "time timestamp ts date datetime tdat unixtime unixreviewtime eventtime createdat",
        "event": "event eventtype behavior behaviour behaviortype action actiontype",
        "rating": "rating overall stars score",
        "quantity": "quantity qty lineitemquantity itemquantity itemqty productquantity productqty orderquantity "
        "orderqty orderedquantity orderedqty quantityordered qtyordered quantitypurchased",
        "title": "title name itemtitle itemname producttitle productname prodname movietitle",
        "description": "description desc itemdescription productdescription detaildesc",
        "features": "feature features",  # stand in for an empty description
        "brand": "brand store",
        "categories": "category categories",
        "price": "price saleprice unitprice currentprice",
    }.items()
}
LAST_RESORT = {"user": ("sessionid",), "item": ("id",)}  # where no other name is there
OPTIONAL = ("description", "features", "brand", "categories", "price", "quantity")


def is_known_name(name: str) -> bool:
    """Whether a text is the name of a column that a role knows."""
    return any(_plain(name) in names for table in (COLUMNS, LAST_RESORT) for names in table.values())


def find_columns(
    source: "Source", roles: Sequence[str], given: dict[str, str], other: Sequence[str] = ()
) -> list[str | None]:
    """The column of each role; None for an optional role without a column.

    Args:
        roles: keys of COLUMNS.
        given: role -> the column name that a flag gave, or "" to look for the names in COLUMNS.
        other: the columns of the other file. `--item_column` may name a column that only the other file has, or one
            for each, as in `2,1`: of the interactions and of the items.

    Raises InputError, one line per role, if a column is missing or several are possible.
    """
    problems = []
    listed = ", ".join(shorten(name, 40) for name in source.names[:30]) + (", …" if len(source.names) > 30 else "")
    hint = "; if that is a row, give --no_header True" if source.kind == "delimited" and source.header else ""
    found: list[str | None] = []
    for role in roles:
        name, flag = given.get(role, ""), f"--{role}_column"
        if name not in source.names and name.count(",") == 1:
            name = name.split(",")[source.flag != "interactions"].strip()
        candidates = [name] if name in source.names else []
        if not name or (not candidates and name in other):
            candidates = _candidates(source, role)
        found.append(candidates[0] if candidates else None)
        place = f"--{source.flag} {source.path}"
        if len(candidates) > 1 and role not in OPTIONAL[1:]:
            problems.append(f"{place}: {' and '.join(candidates)} could each be the {role}; name one with {flag}")
        elif candidates and source.names.count(candidates[0]) > 1:
            problems.append(f"{place}: column {candidates[0]} occurs {source.names.count(candidates[0])} times")
        elif not candidates and name:
            problems.append(f"{place}: {flag} {name} is not a column; the file has {listed}")
        elif not candidates and role not in OPTIONAL:
            problems.append(
                f"{place}: no column is recognized as the {role}; name it with {flag}; the file has {listed}{hint}"
            )
    if problems:
        raise InputError(problems)
    return found


def _candidates(source: "Source", role: str) -> list[str]:
    """The columns that could have a role, by their names. One that is empty is none if another is not."""
    distinct = list(dict.fromkeys(source.names))
    candidates = [name for name in distinct if _plain(name) in COLUMNS[role]]
    if "parent_asin" in candidates and "asin" in candidates:
        candidates.remove("asin")  # of a variant of the item; the metadata of 2023 uses parent_asin
    if not candidates and (role != "item" or source.flag != "interactions"):
        candidates = [name for name in distinct if _plain(name) in LAST_RESORT.get(role, ())]
    return [name for name in candidates if name not in source.empty] or candidates


def _plain(name: str) -> str:
    return re.sub("[ _]", "", re.sub(r":(token|float)(_seq)?$", "", name.strip().lower()))
