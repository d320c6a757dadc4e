"""What goes out to Ollama for a request that loads a model: its options, or on ``/v1`` the name of a derived model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.errors import LopsidedError
from proxy.ollama.endpoints import V1_PATHS, LoadRequest
from proxy.ollama.options import stock
from proxy.placing.placement import Decision, Placements
from proxy.v1.derived import Derived
from proxy.v1.renaming import Alias

_PLAIN_NAME = re.compile(r"[\w.:/@-]+", re.ASCII)
"""A name that stands in JSON as it is, as every name does that Ollama takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """The body to send, and the text of ``X-Lopsided-Plan``."""

    body: bytes
    text: str
    as_planned: bool = True
    """It carries the plan's options, where there are any."""
    alias: Alias | None = None
    """The derived model that it names, and what the client calls it."""


async def outgoing(path: str, wanted: LoadRequest, decision: Decision, *, derived: Derived, placements: Placements) -> Outgoing:
    """What to send for ``wanted``; never raises. Where there is no derived model, the request goes as it is.

    The model then counts as seen on ``/v1``, if that will last: options on ``/api`` would make it reload with each change of
    client.
    """
    delivery = decision.delivery
    if path not in V1_PATHS:
        body = wanted.with_options(delivery.options, without=delivery.without)
        return Outgoing(body=body, text=delivery.text)
    if not delivery.options or decision.in_force is None or not _PLAIN_NAME.fullmatch(wanted.model):
        return Outgoing(body=wanted.body, text=delivery.text, as_planned=not delivery.options)
    try:
        name = await derived.name_for(wanted.model, decision.in_force.blob, delivery.options)
    except LopsidedError as error:
        if derived.refusal(wanted.model):
            placements.seen_on_v1(wanted.model)
        return as_it_is(wanted, str(error))
    alias = Alias(derived=name, name=wanted.model)
    return Outgoing(body=wanted.with_model(name), text=delivery.text, alias=alias)


def as_it_is(wanted: LoadRequest, reason: str) -> Outgoing:
    """The request unchanged, and why."""
    return Outgoing(body=wanted.body, text=stock(reason).text, as_planned=False)
