"""A rule of nft's JSON as a line for people, close to what nft itself prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_MOST_ELEMENTS = 8


def text_of(value: Any) -> str:
    """A statement, an expression, or a list of statements."""
    if isinstance(value, list):
        return " ".join(filter(None, map(text_of, value)))
    if not isinstance(value, dict):
        return re.sub(r"\s+", " ", str(value))
    name: str
    name, inner = next(iter(value.items()))
    if inner is None:
        return name
    write = _WRITERS.get(name)
    if write is not None:
        return write(inner)
    return name if isinstance(inner, dict) else f"{name} {text_of(inner)}"


def _match(inner: Any) -> str:
    operator = "" if inner["op"] in {"==", "in"} else f"{inner['op']} "
    return f"{text_of(inner['left'])} {operator}{text_of(inner['right'])}"


def _meta(inner: Any) -> str:
    key = str(inner["key"])
    return key if key in {"iifname", "oifname", "iif", "oif"} else f"meta {key}"


def _payload(inner: Any) -> str:
    return f"{inner['protocol']} {inner['field']}" if "field" in inner else "payload"


def _set(inner: Any) -> str:
    if not isinstance(inner, list):
        return text_of(inner)
    more = ", ..." if len(inner) > _MOST_ELEMENTS else ""
    return f"{{ {', '.join(map(text_of, inner[:_MOST_ELEMENTS]))}{more} }}"


def _to(name: str) -> Callable[[Any], str]:
    def write(inner: Any) -> str:
        address, port = text_of(inner.get("addr", "")), inner.get("port")
        to = address if port is None else f"{address}:{text_of(port)}"
        return f"{name} to {to}" if to else name

    return write


_WRITERS: dict[str, Callable[[Any], str]] = {
    "match": _match,
    "meta": _meta,
    "payload": _payload,
    "set": _set,
    "ct": lambda inner: f"ct {inner['key']}",
    "fib": lambda inner: f"fib {' . '.join(inner['flags'])} {inner['result']}",
    "prefix": lambda inner: f"{inner['addr']}/{inner['len']}",
    "range": lambda inner: f"{text_of(inner[0])}-{text_of(inner[1])}",
    "elem": lambda inner: text_of(inner["val"]),
    "concat": lambda inner: " . ".join(map(text_of, inner)),
    "&": lambda inner: f"{text_of(inner[0])} & {text_of(inner[1])}",
    "|": lambda inner: "|".join(map(text_of, inner)),
    "counter": lambda inner: "",
    "jump": lambda inner: f"jump {inner['target']}",
    "goto": lambda inner: f"goto {inner['target']}",
    "redirect": _to("redirect"),
    "dnat": _to("dnat"),
    "tproxy": _to("tproxy"),
    "mangle": lambda inner: f"{text_of(inner['key'])} set {text_of(inner['value'])}",
}
