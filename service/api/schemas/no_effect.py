"""Fields that clients always send and that change nothing here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.api.schemas.body import Body
from service.api.schemas.fields import MAX_NAME_CHARACTERS

NO_EFFECT = "Accepted because tools send it; changes nothing."

Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class CacheControl(Body):
    """Where a prompt should be cached, for servers that are told: this one caches every prompt."""

    type: Literal["ephemeral"] | None = None
    ttl: Name | None = None
