"""The simulated Internet of the demo: a web server and a name server, on sockets of the lab's outside host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset


class _Page(BaseHTTPRequestHandler):
    """A page that shows the client's address and the requested host."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        client = self.client_address[0].removeprefix("::ffff:")
        body = f"Hello {client}, this is {self.headers.get('Host')}.\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Your-Address", client)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _Page, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = "beyond", listener.getsockname()[1]


def serve_web(listener: socket.socket) -> None:
    """Serve the page on this listening socket, in a thread, until the process ends."""
    threading.Thread(target=_Web(listener).serve_forever, daemon=True).start()


def serve_names(bound: socket.socket, names: Mapping[str, tuple[str, ...]]) -> None:
    """Answer A and AAAA queries on this UDP socket, in a thread, until the process ends. Other names do not exist."""
    threading.Thread(target=_answer, args=(bound, names), daemon=True).start()


def _answer(bound: socket.socket, names: Mapping[str, tuple[str, ...]]) -> None:
    while True:
        packet, client = bound.recvfrom(4096)
        try:
            query = dns.message.from_wire(packet)
            question = query.question[0]
        except Exception:  # not a query
            continue
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        known = names.get(question.name.to_text(omit_final_dot=True).lower())
        if known is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            family = {dns.rdatatype.A: ".", dns.rdatatype.AAAA: ":"}.get(question.rdtype, "none")
            if found := [address for address in known if family in address]:
                response.answer.append(dns.rrset.from_text(question.name, 60, "IN", question.rdtype, *found))
        bound.sendto(response.to_wire(), client)
