"""Explains a request for `usocksd explain`: decides it as a session would, with the reasons, and connects to nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
import trio

from usocksd.acl import COMMANDS, CONNECT
from usocksd.clients import ALLOW_FROM, Client
from usocksd.decision import REQUIRED, USERS, Candidate, Decision, Policy
from usocksd.dnsbl import Listings
from usocksd.egress import EgressPools, Source
from usocksd.errors import Denied, Error, NoEgress, ResolveError
from usocksd.names.resolver import Resolver
from usocksd.net.address import IPAddress

ALLOWED: Final = "allowed"
DENIED: Final = "denied"
UNREACHABLE: Final = "unreachable"
"""The rules allow it, but there is no address to connect to, or no source address."""

NO_USERS: Final = "there are no users: any password lets the client in, and the rules see no user"
_REFUSALS: Final = {
    ALLOW_FROM: "clients of this address are not admitted",
    USERS: "there is no such user",
    REQUIRED: "every client has to authenticate",
}

Json = dict[str, Any]


@attrs.frozen
class Explainer:
    """Explains requests under one configuration."""

    policy: Policy
    resolver: Resolver
    egress: EgressPools
    listings: Listings
    timeout: float
    """Seconds for resolving."""

    async def explain(self, parameters: Mapping[str, Any]) -> Json:
        """The verb: docs/explain.md lists what is in the answer. Raises Error for wrong parameters."""
        client, host, port, command = read_request(parameters)
        answer: Json = {
            "client": str(client.address),
            "user": client.user,
            "host": host,
            "port": port,
            "command": command,
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
        if client.user is not None and self.policy.users is None:
            answer["note"] = NO_USERS
            client = client._replace(user=None)  # as the session does
        if (refusal := self.policy.refusal(client)) is not None:
            answer |= {"rule": refusal, "error": _REFUSALS[refusal]}
        else:
            answer |= await self._decide(client, host, port, command)
        names = {each["pool"] for each in [answer, *answer["addresses"]]}
        answer["pools"] = {name: pool for name, pool in self.listings.status().items() if name in names}
        return answer

    async def _decide(self, client: Client, host: str, port: int, command: str) -> Json:
        """What to change in the answer."""
        try:
            decision = Decision(self.policy.rules, client, host, port, command)
        except ResolveError as error:
            return {"verdict": UNREACHABLE, "error": error.cause}
        verdict, problem = ALLOWED, None
        try:
            with trio.fail_after(self.timeout):
                if decision.unresolved:
                    await decision.resolve(self.resolver.full_names(host), self.resolver.resolve)
            decision.choose_egress(self._pick)
        except Denied:
            verdict = DENIED
        except (ResolveError, NoEgress) as error:
            verdict, problem = UNREACHABLE, str(error)
        except trio.TooSlowError:
            verdict, problem = UNREACHABLE, f"{decision.name}: timed out"
        ruling = decision.ruling
        assert ruling is not None
        # An address that was asked for and is denied is not listed again.
        listed = decision.name is not None or ruling.allowed
        return {
            "verdict": verdict,
            "rule": ruling.rule,
            "pool": ruling.pool if ruling.allowed else None,
            "error": problem,
            "canonical": decision.name or decision.sent,
            "absent": [error.name for error in decision.absent],
            "steps": _steps(decision, None),
            "addresses": [_address(decision, each) for each in decision.candidates or ()] if listed else [],
        }

    def _pick(self, pool: str, client: Client, site: str, address: IPAddress) -> Source:
        source = self.egress.pick(pool, client, site, address)
        if source.iface is None and address.version == 6 and address.is_link_local:
            raise NoEgress(f'it is link-local, and pool "{pool}" has no iface')  # an error that connect(2) would report
        return source


def read_request(parameters: Mapping[str, Any]) -> tuple[Client, str, int, str]:
    """Client, host, port and command, from the parameters of the verb. Raises Error that says what is wrong."""
    client, user, host, port = (parameters.get(key) for key in ("client", "user", "host", "port"))
    if not isinstance(client, str) or not isinstance(host, str) or not isinstance(user, str | None):
        raise Error("expected client and host as strings, and user as a string or null")
    if type(port) is not int or not 1 <= port <= 65535:
        raise Error("expected port as an integer from 1 to 65535")
    command = parameters.get("command", CONNECT)
    if command not in COMMANDS:
        raise Error(f"expected command as one of {', '.join(COMMANDS)}")
    try:
        return Client.at(client, user=user), host, port, command
    except ValueError:
        raise Error(f"not the address of a client: {client}") from None


def _steps(decision: Decision, candidate: Candidate | None) -> list[Json]:
    return [attrs.asdict(answer) for answer in decision.trace(candidate)]


def _address(decision: Decision, candidate: Candidate) -> Json:
    """The ruling on an address, and the source of a connection to it."""
    ruling, source = candidate.ruling, candidate.source
    return {
        "address": candidate.host,
        "allowed": ruling.allowed,
        "rule": ruling.rule,
        "pool": ruling.pool if ruling.allowed else None,
        "steps": _steps(decision, candidate),
        "sources": [] if source is None else [source.address, *source.spare],  # None: the kernel chooses
        "error": None if candidate.error is None else str(candidate.error),
    }
