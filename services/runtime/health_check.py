"""Asks a service for its health with the standard library alone.

Whatever watches over a service asks every few seconds, in every container and from a process of its
own. To import gRPC and to read the settings costs that process many times what the question does.
So the one call that it takes is made by hand here: HTTP/2 (RFC 9113) without compressed headers
(RFC 7541), as gRPC uses it (grpc/doc/PROTOCOL-HTTP2.md). And a service notes at its start where it
is to be asked.
"""

import os
import socket
import time
from collections.abc import Iterator

# SERVING for as long as the process answers at all: for what restarts a process that does not,
# which would not help one that drains or misses another service.
LIVENESS = "liveness"
# Names the file in which the service of a container notes its endpoint.
PROBE_FILE_VARIABLE = "MESHSERVE_PROBE_FILE"
TIMEOUT_S = 3.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES = 9
_LARGEST_FRAME_BYTES = 16384  # unless told otherwise, and we tell nothing
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4
_STREAM = 1
_MESSAGE_HEADER_BYTES = 5
# HealthCheckResponse{status: SERVING}.
_SERVING = b"\x08\x01"


class Endpoint:
    """Where a service is asked, and how."""

    def __init__(
        self,
        address: str,
        *,
        tls: bool = False,
        ca: str = "",
        certificate: str = "",
        private_key: str = "",
        server_name: str = "",
    ) -> None:
        """
        Args:
            address: `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH` or `unix-abstract:NAME`.
            tls: whether it talks TLS; the rest is about that.
            ca: PEM file of the CA to trust; the system's when empty.
            certificate: PEM file to show, with `private_key`, its key; none when empty.
            server_name: name that its certificate must carry; that of the address when empty.
        """
        self.address = address
        self.tls = tls
        self.ca = ca
        self.certificate = certificate
        self.private_key = private_key
        self.server_name = server_name


def announce(service: str, endpoint: Endpoint) -> None:
    """Notes the endpoint of this process's service where probes look for it, if they do. Raises
    OSError."""
    path = os.environ.get(PROBE_FILE_VARIABLE)
    if not path:
        return
    note = {**vars(endpoint), "tls": "yes" if endpoint.tls else "", "service": service}
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in note.items())
    os.replace(f"{path}.new", path)


def announced(service: str) -> Endpoint | None:
    """What the service of this container has noted; None where it has not."""
    path = os.environ.get(PROBE_FILE_VARIABLE)
    if not path:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            note = dict(line.rstrip("\n").split("=", 1) for line in file)
    except FileNotFoundError:
        return None
    if note.pop("service") != service:
        return None
    return Endpoint(note.pop("address"), tls=bool(note.pop("tls")), **note)


def ask(endpoint: Endpoint, name: str = "", timeout_s: float = TIMEOUT_S) -> str:
    """Why an endpoint is not healthy, by a name of its grpc.health.v1; empty if it is."""
    deadline = time.monotonic() + timeout_s
    try:
        with _connected(endpoint, deadline) as connection:
            connection.sendall(_call(endpoint, name, timeout_s))
            message = _response(connection, deadline)
    except TimeoutError:
        return f"did not answer within {timeout_s:g} s"
    except OSError as error:
        why = error.strerror or str(error)
        return (
            f"cannot be asked: {error.filename}: {why}"
            if error.filename
            else (f"cannot be asked: {why}")
        )
    return "" if message == _SERVING else "is not serving"


def _connected(endpoint: Endpoint, deadline: float) -> socket.socket:
    kind, _, rest = endpoint.address.partition(":")
    if kind in ("unix", "unix-abstract"):
        host = "localhost"
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_remaining_s(deadline))
        connection.connect(f"\0{rest}" if kind == "unix-abstract" else rest.removeprefix("//"))
    else:
        host, _, port = endpoint.address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        connection = socket.create_connection((host, int(port)), _remaining_s(deadline))
    if not endpoint.tls:
        return connection
    return _encrypted(connection, endpoint, host, deadline)


def _encrypted(
    connection: socket.socket, endpoint: Endpoint, host: str, deadline: float
) -> socket.socket:
    import ssl  # as long to import as all the rest

    for path in filter(None, (endpoint.ca, endpoint.certificate, endpoint.private_key)):
        os.stat(path)  # whose error names the file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # As gRPC: what is trusted need not have signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    if endpoint.ca:
        context.load_verify_locations(endpoint.ca)
    else:
        context.load_default_certs()
    if endpoint.certificate:
        context.load_cert_chain(endpoint.certificate, endpoint.private_key)
    connection.settimeout(_remaining_s(deadline))
    return context.wrap_socket(connection, server_hostname=endpoint.server_name or host)


def _call(endpoint: Endpoint, name: str, timeout_s: float) -> bytes:
    """All that a client has to say."""
    encoded = name.encode()
    # HealthCheckRequest{service: name}, and before it that it is not compressed, and its length.
    request = b"\x0a" + bytes([len(encoded)]) + encoded if encoded else b""
    message = b"\0" + len(request).to_bytes(4, "big") + request
    headers = b"".join(
        _header(*each)
        for each in (
            (":method", "POST"),
            (":scheme", "https" if endpoint.tls else "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", endpoint.server_name or endpoint.address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{max(1, round(1000 * timeout_s))}m"),
        )
    )
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, _STREAM, headers)
        + _frame(_DATA, _END_STREAM, _STREAM, message)
    )


def _header(name: str, value: str) -> bytes:
    """A header in HPACK, literally (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_string(text.encode()) for text in (name, value))


def _string(text: bytes) -> bytes:
    """A string literal in HPACK (RFC 7541, 5.1 and 5.2)."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest = len(text) - 127
    length = bytearray([127])
    while rest >= 128:
        length.append(rest % 128 | 128)
        rest //= 128
    length.append(rest)
    return bytes(length) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def _response(connection: socket.socket, deadline: float) -> bytes:
    """The message of the answer. Raises OSError where there is none."""
    body = b""
    for kind, flags, stream, payload in _frames(connection, deadline):
        if stream != _STREAM:
            continue
        if kind == _DATA:
            body += payload
            end = _MESSAGE_HEADER_BYTES + int.from_bytes(body[1:_MESSAGE_HEADER_BYTES], "big")
            if len(body) >= max(end, _MESSAGE_HEADER_BYTES):
                return body[_MESSAGE_HEADER_BYTES:end]
        if kind == _RST_STREAM or flags & _END_STREAM:
            break
    raise ConnectionError("the call was refused")


def _frames(connection: socket.socket, deadline: float) -> Iterator[tuple[int, int, int, bytes]]:
    """The type, flags, stream and payload of each frame that comes."""
    received = b""
    while True:
        end = _FRAME_HEADER_BYTES + int.from_bytes(received[:3], "big")
        if len(received) >= _FRAME_HEADER_BYTES and end > (
            _FRAME_HEADER_BYTES + _LARGEST_FRAME_BYTES
        ):
            raise ConnectionError("it does not speak gRPC")
        if len(received) >= max(end, _FRAME_HEADER_BYTES):
            stream = int.from_bytes(received[5:_FRAME_HEADER_BYTES], "big")
            yield received[3], received[4], stream, received[_FRAME_HEADER_BYTES:end]
            received = received[end:]
            continue
        connection.settimeout(_remaining_s(deadline))
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError("the connection was closed")
        received += piece


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
