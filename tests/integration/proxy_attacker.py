"""Attack a proxy until standard input ends; then tell what became of it, as JSON.

Run as ``python proxy_attacker.py PORT CERTIFICATE KEY``; it prints ``ready`` once all is under way.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress

import httpx

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
BODY = (
    b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100000\r\n\r\n"
)


def is_cut_off(connection: ssl.SSLSocket) -> bool:
    """Whether the other side has closed it, with an answer before or without."""
    connection.settimeout(5)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def attack(port: int, certificate: str, key: str) -> dict[str, object]:
    """Slow headers and bodies, idle connections, and one address that floods."""
    context = ssl.create_default_context(cafile=certificate)
    over = threading.Event()
    statuses: list[int] = []

    def flood() -> None:
        with httpx.Client(
            base_url=f"https://localhost:{port}",
            headers={"authorization": f"Bearer {key}"},
            transport=httpx.HTTPTransport(verify=context, local_address="127.0.0.3"),
            timeout=30,
        ) as client:
            while not over.wait(0.005):
                statuses.append(client.get("/v1/people").status_code)

    def drip(connections: list[ssl.SSLSocket]) -> None:
        while not over.wait(1.0):
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(b"X")

    with ExitStack() as stack:

        def opened(address: str, sent: bytes) -> ssl.SSLSocket:
            plain = socket.create_connection(("localhost", port), 10, source_address=(address, 0))
            connection = context.wrap_socket(plain, server_hostname="localhost")
            connection.sendall(sent)
            return stack.enter_context(connection)

        heads = [opened(f"127.0.1.{1 + number}", HEAD) for number in range(40)]
        bodies = [opened(f"127.0.2.{1 + number}", BODY) for number in range(40)]
        idle = [opened(f"127.0.3.{1 + number % 60}", b"") for number in range(300)]
        threads = [threading.Thread(target=flood) for _ in range(4)]
        threads += [threading.Thread(target=drip, args=(part,)) for part in (heads, bodies)]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        print("ready", flush=True)
        sys.stdin.read()
        seconds = time.monotonic() - started
        over.set()
        for thread in threads:
            thread.join()
        return {
            "statuses": Counter(statuses),
            "a_second": len(statuses) / seconds,
            "idle": len(idle),
            "heads": len(heads),
            "heads_cut_off": sum(map(is_cut_off, heads)),
        }


if __name__ == "__main__":
    os.nice(19)  # attackers have machines of their own: these get what the others leave of this one
    print(json.dumps(attack(int(sys.argv[1]), *sys.argv[2:])))
