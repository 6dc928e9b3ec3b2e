"""What the server takes and gives, as its interface describes it. `RequestReader` checks requests."""

from pydantic import BaseModel, ConfigDict, Field

from minionerec.data.items import ExcludeSeen
from minionerec.serving.requests import MOST_HISTORY

MOST_LISTED = 20_000  # items of "allow" and of "deny"


class RecommendRequest(BaseModel):
    """A request. Items are named by id, SID or title; null stands for what is not given."""

    model_config = ConfigDict(extra="forbid")

    history: list[str | int] = Field(
        description="what was bought, oldest first", examples=[["12", "40"]], min_length=1, max_length=MOST_HISTORY
    )
    K: int | None = Field(None, description="how many items to recommend, at most --num_beams", ge=1)
    exclude_seen: ExcludeSeen | None = Field(
        None, description='leave out the items of the history; "earlier": all but the last'
    )
    allow: list[str | int] | None = Field(None, description="recommend only these", max_length=MOST_LISTED)
    deny: list[str | int] | None = Field(None, description="do not recommend these", max_length=MOST_LISTED)
    where: str | None = Field(
        None, description="a condition on a column of the item file", examples=["brand=3M", "price<20"]
    )


class FoundItem(BaseModel):
    """An item of the catalogue; `original_id` is the shop's own id, if that is known."""

    id: str
    original_id: str | None = None
    title: str
    sid: str


class RecommendedItem(FoundItem):
    """An item and the log-probability of its SID, in nats."""

    score: float


class RecommendResponse(BaseModel):
    """The items for a history, best first; fewer than K where fewer are allowed."""

    history: list[str]
    items: list[RecommendedItem]


class Column(BaseModel):
    """A column of the item file and its most common values, for `where`."""

    name: str
    values: list[str]


class Options(BaseModel):
    """How many items a request gets where it does not say, and at most; whether it then leaves out its history; whether
    it names items by `original_id` only; and the columns whose values items share."""

    K: int
    most: int
    exclude_seen: ExcludeSeen
    original_ids: bool
    columns: list[Column]


class Health(BaseModel):
    """`status` is loading or ok; `waiting` counts the requests that wait for the model."""

    status: str
    items: int
    waiting: int


class ErrorResponse(BaseModel):
    """What is wrong."""

    detail: list[str]
