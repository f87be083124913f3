"""msgspec's complaints about a message, with what is allowed instead."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import msgspec

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.requests import Pool, Strategy, Workload

_ALLOWED = {
    "algorithm": ALGORITHM_CHOICES,
    "strategy": get_args(Strategy),
    "action": get_args(get_type_hints(Pool)["action"]),
}
_VALUE = re.compile(r"Invalid enum value (?P<value>.*) - at `\$.*?(?P<field>\w+)`$")
_FIELD = re.compile(r"unknown field `(?P<field>\w+)`(?: - at `(?P<place>[^`]*)`)?$")


def in_words(error: msgspec.DecodeError) -> str:
    """What was got and what is allowed.

    "Invalid enum value 'fast' - at `$.algorithm`" becomes "algorithm is 'fast'; it must be one of
    padded, padded_symm_recv, padded_symm, direct".
    """
    text = str(error)
    value, field = _VALUE.search(text), _FIELD.search(text)
    if value and value["field"] in _ALLOWED:
        allowed = ", ".join(_ALLOWED[value["field"]])
        return f"{value['field']} is {value['value']}; it must be one of {allowed}"
    if field and re.search(r"workloads?(\[.*\])?$", field["place"] or ""):
        return f"there is no {field['field']!r}; a workload has {_names(Workload)}"
    if field:
        return f"{text}: this version of the protocol has no such field"
    return text


def unknown_options(error: msgspec.DecodeError) -> str:
    """As `in_words`, for the options of a workload outside of any message."""
    field = _FIELD.search(str(error))
    if field and not field["place"]:
        return f"there is no option {field['field']!r}; use {_names(Workload)}"
    return in_words(error)


def _names(struct: type[msgspec.Struct]) -> str:
    return ", ".join(struct.__struct_fields__)
