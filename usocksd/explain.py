"""What a session would do with a request, and why, without dialling: what `usocksd explain` tells.

It asks the same rules, resolver and pools as session.py does, in the same order.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import trio

from usocksd.acl import Decision
from usocksd.clients import ALLOW_FROM
from usocksd.dnsbl import Listings
from usocksd.egress import EgressPools, sites
from usocksd.errors import Denied, Error, NoEgress, ResolveError
from usocksd.names.answers import ABSENT, NO_SUCH_NAME
from usocksd.names.match import canonical_host
from usocksd.names.resolver import Resolver
from usocksd.net.address import IPAddress, numeric_address
from usocksd.policy import USERS, Policy

ALLOWED: Final = "allowed"
DENIED: Final = "denied"
UNREACHABLE: Final = "unreachable"
"""Allowed, and yet there is nowhere to connect to, or nothing to leave from."""

REQUIRED: Final = "auth.required"
NO_USERS: Final = "there are no users: with any password the client is let in, and is nobody to the rules"

Json = dict[str, Any]


@attrs.frozen
class Asked:
    """A request to be explained: from which client, as which user, to where (as a client would write it)."""

    client: IPAddress
    user: str | None
    host: str
    port: int

    @classmethod
    def read(cls, parameters: Mapping[str, Any]) -> Asked:
        """From the parameters of the verb `explain`. Raises Error that says what is wrong."""
        client, user, host, port = (parameters.get(key) for key in ("client", "user", "host", "port"))
        if not isinstance(client, str) or not isinstance(host, str) or not (user is None or isinstance(user, str)):
            raise Error("expected client and host as strings, and user as a string or null")
        if type(port) is not int or not 1 <= port <= 65535:
            raise Error("expected port as an integer from 1 to 65535")
        try:
            return cls(numeric_address(client), user, host, port)
        except ValueError:
            raise Error(f"not the address of a client: {client}") from None


@attrs.frozen
class Explainer:
    """Explains requests under the rules of one configuration."""

    policy: Policy
    resolver: Resolver
    egress: EgressPools
    listings: Listings
    timeout: float
    """Seconds for resolving."""

    async def explain(self, parameters: Mapping[str, Any]) -> Json:
        """The verb: see docs/explain.md for what is in the answer. Raises Error for parameters that won't do."""
        asked = Asked.read(parameters)
        answer: Json = {
            "client": str(asked.client),
            "user": asked.user,
            "host": asked.host,
            "port": asked.port,
            "verdict": DENIED,
            "rule": None,
            "pool": None,
            "error": None,
            "note": None,
            "canonical": None,
            "absent": [],
            "steps": [],
            "addresses": [],
            "pools": {},
        }
        answer.update(await self._judge(asked, answer))
        names = {each["pool"] for each in [answer, *answer["addresses"]]}
        answer["pools"] = {name: pool for name, pool in self.listings.status().items() if name in names}
        return answer

    async def _judge(self, asked: Asked, answer: Json) -> Json:
        """What to change in the answer."""
        policy = self.policy
        if not policy.clients.admits(asked.client):
            return {"rule": ALLOW_FROM, "error": "clients of this address are not admitted"}
        if asked.user is not None and policy.users is None:
            # As session.py does.
            answer["note"] = NO_USERS
            asked = attrs.evolve(asked, user=None)
        client, user, port = asked.client, asked.user, asked.port
        if user is not None and user not in (policy.users or ()):
            return {"rule": USERS, "error": "there is no such user"}
        if user is None and policy.required:
            return {"rule": REQUIRED, "error": "every client has to authenticate"}
        try:
            host = canonical_host(asked.host)
        except ValueError as error:
            return {"verdict": UNREACHABLE, "error": str(error)}
        if not isinstance(host, str):
            decision = policy.rules.decide_name(client, user, host, port)
            steps = answer["steps"] = self._steps(client, user, host, port)
            answer["canonical"] = str(host)
            if not decision.allowed:
                return {"rule": decision.rule}
            answer["addresses"] = [self._address(asked, sites((host,)), host, decision, steps)]
            return _summary(answer["addresses"])
        try:
            with trio.fail_after(self.timeout):
                name, addresses = await self._resolve(asked, host, answer)
        except Denied as error:
            return {"rule": error.rule}
        except ResolveError as error:
            return {"verdict": UNREACHABLE, "error": str(error)}
        except trio.TooSlowError:
            return {"verdict": UNREACHABLE, "error": f"{answer['canonical']}: timed out"}
        for ip in addresses:
            sent = None if name == host else host
            decision = policy.rules.decide_address(client, user, name, ip, port, sent=sent)
            steps = self._steps(client, user, name, port, address=ip, sent=sent)
            answer["addresses"].append(self._address(asked, sites(addresses), ip, decision, steps))
        return _summary(answer["addresses"])

    async def _resolve(self, asked: Asked, sent: str, answer: Json) -> tuple[str, tuple[IPAddress, ...]]:
        """As the session does: the first name with addresses, of those that the requested one may stand for."""
        denied: Denied | None = None
        why_denied: Json = {}
        absent: ResolveError | None = None
        for name in self.resolver.full_names(asked.host):
            also = None if name == sent else sent
            decision = self.policy.rules.decide_name(asked.client, asked.user, name, asked.port, sent=also)
            judged = {
                "canonical": name,
                "steps": self._steps(asked.client, asked.user, name, asked.port, sent=also),
            }
            if not decision.allowed:
                if denied is None:
                    denied, why_denied = Denied(decision.rule), judged
                continue
            answer |= judged
            # As far as the name is concerned; its addresses may say otherwise.
            answer |= {"rule": decision.rule, "pool": decision.egress}
            try:
                return name, await self.resolver.resolve(name)
            except ResolveError as error:
                if error.cause not in ABSENT:
                    raise
                answer["absent"].append(name)
                absent = absent or error
        answer |= why_denied
        raise denied or absent or ResolveError(asked.host, NO_SUCH_NAME)

    def _steps(self, *asked: Any, address: IPAddress | None = None, sent: str | None = None) -> list[Json]:
        return [
            {"rule": step.rule, "line": step.line, "matched": step.matched, "why": step.why}
            for step in self.policy.rules.trace(*asked, address=address, sent=sent)
        ]

    def _address(
        self, asked: Asked, where: Mapping[int, str], ip: IPAddress, decision: Decision, steps: list[Json]
    ) -> Json:
        """What is decided on an address to be dialled, and what the connection would leave from."""
        answer: Json = {
            "address": str(ip),
            "allowed": decision.allowed,
            "rule": decision.rule,
            "pool": decision.egress if decision.allowed else None,
            "steps": steps,
            "sources": [],
            "error": None,
        }
        if decision.allowed:
            family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
            try:
                sources = self.egress.ranking(
                    decision.egress, asked.client, where[ip.version], family, self.listings.usable()
                )
            except NoEgress as error:
                answer["error"] = str(error)
            else:
                if sources[0].iface is None and ip.version == 6 and ip.is_link_local:
                    answer["error"] = f'it is link-local, and pool "{decision.egress}" has no iface'
                    return answer
                answer["sources"] = [source.address for source in sources]  # None: the kernel chooses
        return answer


def _summary(addresses: Sequence[Json]) -> Json:
    """What the addresses come to: the first that can be dialled counts, since it is tried first."""
    for each in addresses:
        if each["allowed"] and each["sources"]:
            return {"verdict": ALLOWED, "rule": each["rule"], "pool": each["pool"]}
    for each in addresses:
        if each["allowed"]:
            return {"verdict": UNREACHABLE, "rule": each["rule"], "pool": each["pool"], "error": each["error"]}
    return {"verdict": DENIED, "rule": addresses[0]["rule"], "pool": None}
