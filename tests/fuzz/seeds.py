"""The seeds of the fuzzers: at least one valid example of everything that a target reads."""

from __future__ import annotations

import json
import struct
from ipaddress import ip_address
from pathlib import Path

import dns.flags
import dns.message
import dns.rrset

from transocks.tracing.packets import datagram
from transocks.tracing.reports import MESSAGE, Packet
from transocks.tracing.trace import TABLE
from usocksd.host.netlink import HEADER
from usocksd.log.formats import Logfmt, Plain, Severity
from usocksd.net.proxy_protocol import LOCAL_HEADER, header

_HELLOS = Path(__file__).parents[1] / "transocks" / "data"


def _servers() -> list[bytes]:
    request, name = b"\x05\x01\x00\x01\xcb\x00\x71\x05\x01\xbb", b"\x05\x01\x00\x03\x0fwww.example.com\x00\x50"
    said = [
        b"\x05\x01\x00" + request + b"payload",
        b"\x05\x02\x00\x02" + name,
        b"\x05\x01\x02\x01\x04user\x08password" + name,
        b"\x05\x02\x00\x02\x01\x04user\x08password" + request,
        b"\x05\x01\x00\x05\x01\x00\x04" + bytes(15) + b"\x01\x00\x50",
        b"\x05\x02\xf5\x02\x01\x04user\x08password",
        b"\x05\x01\xf5",
        b"\x04\x01\x00\x50\xcb\x00\x71\x05user\x00",
        b"\x04\x01\x00\x50\x00\x00\x00\x01user\x00www.example.com\x00GET",
        b"\x04\xf5\x00\x00\x00\x00\x00\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
    ]
    return [bytes([how]) + each for how in range(4) for each in said]


def _clients() -> list[bytes]:
    said = [
        b"\x05\x00\x05\x00\x00\x01\xc0\x00\x02\x01\x04\x38payload",
        b"\x05\x02\x01\x00\x05\x00\x00\x04" + bytes(16) + b"\x04\x38",
        b"\x05\x02\x05\x00\x05\x00\x00\x03\x04name\x04\x38",
        b"\x05\x00\x05\x05\x00\x01" + bytes(6),
        b"\x05\xff",
        b"\x05\xf5",
        b"\x00\x5a\x04\x38\xc0\x00\x02\x01payload",
        b"\x04\x5b" + bytes(6),
    ]
    return [bytes([how]) + each for how in range(5) for each in said]


def _answers() -> list[bytes]:
    found = []
    query = dns.message.make_query("www.example.com.", "A")
    for lines in (
        ["www.example.com. 60 IN A 192.0.2.1"],
        ["www.example.com. 60 IN CNAME x.example.net.", "x.example.net. 30 IN A 192.0.2.1"],
        ["www.example.com. 60 IN CNAME www.example.com."],
        [],
    ):
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        for line in lines:
            name, ttl, _, kind, text = line.split()
            response.answer.append(dns.rrset.from_text(name, int(ttl), "IN", kind, text))
        if not lines:
            soa = "ns.example. root.example. 1 2 3 4 5"
            response.authority.append(dns.rrset.from_text("example.com.", 60, "IN", "SOA", soa))
            found.append(response.to_wire())
            response.set_rcode(3)
        found.append(response.to_wire())
    return found


_RECORD = (
    '{"topic":"usocksd","logged_at":"2026-11-30T19:00:00.000000Z","severity":"info","utsname":"h","message":"proxy'
    ' starts","type":"access","client_addr":"10.1.2.3:5000","dest_host":"www.example.com","dest_port":443,'
    '"dest_addr":"203.0.113.5:443","dest_name":null,"user":"ci","candidates":["203.0.113.5","2001:db8::1 (denied)"]}'
)


_NFT = [
    b"table inet transocks { # handle 1\n\tflags dormant\n\tset active {\n\t\ttype inet_proto\n\t\tflags timeout\n"
    b'\t\telements = { tcp timeout 1m expires 9s5ms comment "held",\n\t\t\t     udp }\n\t}\n\tchain output { # handle 2\n'
    b"\t\ttype nat hook output priority -90; policy accept;\n"
    b"\t\ttcp dport 80 counter packets 1 bytes 2 drop # handle 7\n\t}\n}\n",
    b"table ip x {\n}\n",
]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _traced(place: str) -> bytes:
    """A message of NFT_MSG_TRACE, from a chain of the tracer's own."""
    packet = datagram(Packet(6, ip_address("192.0.2.1"), 4000, ip_address("192.0.2.2"), 80, 2))
    body = b"\x02\x00\x00\x00" + b"".join(
        _attribute(kind, value)
        for kind, value in (
            (1, TABLE.encode() + b"\0"), (2, place.encode() + b"\0"), (3, bytes(7) + b"\x09"), (4, b"\0\0\0\x03"),
            (5, _attribute(1, b"\0\0\0\x01")), (6, b"\0\0\0\x05"), (8, packet[:20]), (9, packet[20:]), (12, b"\0\0\0\x02"),
        )
    )  # fmt: skip
    return HEADER.pack(HEADER.size + len(body), MESSAGE, 0, 0, 0) + body


_FIELDS = {
    key: value
    for key, value in json.loads(_RECORD).items()
    if key not in ("topic", "logged_at", "severity", "utsname", "message")
}

_HOSTS = [
    "www.Example.com.", "bücher.example", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "[::1]", "fe80::1%eth0",
    "::ffff:127.0.0.1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "xn--bcher-kva.example", "\uff11\uff12\uff17.0.0.1", "a\u3002b", "_x._y.z",
]  # fmt: skip

SEEDS: dict[str, list[bytes]] = {
    "socks_server": _servers(),
    "datagram": [
        b"\0\0\0\x01\xc0\0\x02\x01\0\x35payload",
        b"\0\0\0\x04" + bytes(15) + b"\x01\0\x35",
        b"\0\0\0\x03\x0fwww.example.com\0\x35payload",
        b"\0\0\x81\x01\xc0\0\x02\x01\0\x35",
    ],
    "original_destination_of_datagram": [
        b"\x02\x00\x00\x35\xc0\0\x02\x01" + bytes(8),
        b"\x0a\x00\x00\x35" + bytes(4) + b"\xfe\x80" + bytes(13) + b"\x01\x02\0\0\0",
    ],
    "socks_client": _clients(),
    "socks_probe": _clients(),
    "http_connect": [
        b"HTTP/1.1 200 Connection established\r\n\r\npayload",
        b"HTTP/1.0 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
        b"HTTP/1.1 100 Continue\n\nHTTP/1.1 200\nA: b\n\n",
        b"HTTP/1.1 503 No\r\n\r\n",
    ],
    "proxy_header": [
        header(("192.0.2.7", 1000), ("203.0.113.5", 443)) + b"payload",
        header(("2001:db8::7", 1000), ("203.0.113.5", 443)),
        LOCAL_HEADER + b"payload",
        header(("::1", 1), ("::1", 1))[:14] + b"\x00\x30" + bytes(48),
        b"PROXY TCP4 192.0.2.7 203.0.113.5 1000 443\r\n",
    ],
    "sniff": [b"\x00" + bytes.fromhex(each.read_text("ascii")) for each in sorted(_HELLOS.glob("*.hex"))]
    + [
        b"\x01GET / HTTP/1.1\r\nAccept: */*\r\nHost: www.example.com\r\n\r\n",
        b"\x02GET http://www.example.com:8080/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x01PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    "host": [each.encode() for each in _HOSTS],
    "site": [
        each.encode() for each in ("", ".example.com", "10.0.0.0/8", "2001:db8::/32", "::ffff:10.0.0.0/104", *_HOSTS)
    ],
    "record": [
        _RECORD.encode(),
        _RECORD.replace("proxy starts", "ruleset mismatch").encode(),
        *(kind("usocksd", "h").format(0.0, Severity.INFO, "proxy starts", _FIELDS) for kind in (Plain, Logfmt)),
    ],
    "judged": [b"\x05\x01\x00\x03%c%b\x00\x50" % (len(each.encode()), each.encode()) for each in _HOSTS]
    + [b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", b"\x05\x01\x00\x04" + bytes(16) + b"\x00\x50"],
    "dns_answer": _answers(),
    "hosts_file": [b"127.0.0.1 localhost a # x\n::1 localhost\nfe80::1%lo a B.c.\n", "192.0.2.1 bücher".encode()],
    "resolv_conf": [
        b"nameserver 192.0.2.1\nnameserver ::1\nsearch a.example b.example\noptions ndots:2 timeout:1 rotate edns0\n",
        b"domain example\n; x\n# y\nnameserver fe80::1%lo\n",
    ],
    "control_request": [
        b'{"verb": "status"}\n',
        b'{"verb": "explain", "client": "10.1.2.3", "host": "www.example.com", "port": 443, "user": null}\n',
    ],
    "metrics_request": [
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text; version=1.0.0;q=0.5\r\n\r\n",
        b"HEAD /healthz HTTP/1.0\r\n\r\n",
        b"GET /healthz\r\n",
    ],
    "netlink": [b"\x14\x00\x00\x00\x03\x00\x00\x00" + bytes(12) + b"\x11\x00\x00\x00\x02\x00" + bytes(11)],
    "nft_rules": _NFT,
    "iptables_save": [
        b"# x\n*nat\n:PREROUTING ACCEPT [0:0]\n:TRANSOCKS - [0:0]\n-A OUTPUT -p tcp -j TRANSOCKS\n"
        b'[1:60] -A TRANSOCKS -d 127.0.0.0/8 -m comment --comment "a \\" -j b" -j RETURN\n'
        b"-A TRANSOCKS -m time --datestart 2026-01-01T00:00:00 -j RETURN\n"
        b"-A TRANSOCKS -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n# y\n*filter\n:X - [0:0]\nCOMMIT\n",
        b"*mangle\n-N TRANSOCKS-TPROXY\n-I PREROUTING -j TRANSOCKS-TPROXY\nCOMMIT\n",
    ],
    "trace": [b"".join(_traced(place) for place in ("output_m2000000000", "output_p401", "postrouting_p2000000000"))],
    "channel": [
        b"".join(struct.pack("!IH", len(text), 0) + text for text in (b'{"a": [1, "x"]}', b"{}")),
        struct.pack("!IH", 9000, 0) + b"[" * 9000,
    ],
    "log_record": ["user \x85\x9b\u2028\u202e \U0001f600".encode(), b"\xff\xfe\x00"],
}
