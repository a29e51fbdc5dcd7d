"""Closes the network: only this machine's own loopback and unix sockets stay open."""

import ipaddress
import socket
from pathlib import Path
from typing import Any

_CONNECT, _CONNECT_EX = socket.socket.connect, socket.socket.connect_ex
_SENDTO, _GETADDRINFO = socket.socket.sendto, socket.getaddrinfo


class NetworkUsed(OSError):
    """Something tried to leave this machine while the tests run."""


def _allow(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        if ipaddress.ip_address(name).is_loopback:
            return
    except ValueError:  # a name, not an address: it would have to be looked up
        pass
    raise NetworkUsed(f"tests are offline, yet something asked for {name!r}")


def _allow_address(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _allow(address[0])


def _connect(sock: socket.socket, address: Any) -> None:
    _allow_address(sock, address)
    return _CONNECT(sock, address)


def _connect_ex(sock: socket.socket, address: Any) -> int:
    _allow_address(sock, address)
    return _CONNECT_EX(sock, address)


def _sendto(sock: socket.socket, data: Any, *rest: Any) -> int:
    _allow_address(sock, rest[-1])
    return _SENDTO(sock, data, *rest)


def _getaddrinfo(host: Any, *rest: Any, **named: Any) -> list:
    _allow(host)
    return _GETADDRINFO(host, *rest, **named)


def forbid() -> None:
    """Refuse every connection and look-up that is not for this machine."""
    socket.socket.connect = _connect
    socket.socket.connect_ex = _connect_ex
    socket.socket.sendto = _sendto
    socket.getaddrinfo = _getaddrinfo


def forbid_at_start(folder: Path) -> None:
    """Make every Python that starts with ``folder`` on PYTHONPATH call :func:`forbid`."""
    here = str(Path(__file__).parent)
    code = f"import sys\nsys.path.append({here!r})\nimport offline\noffline.forbid()\n"
    (folder / "sitecustomize.py").write_text(code)


def allow() -> None:
    """Undo :func:`forbid`."""
    socket.socket.connect = _CONNECT
    socket.socket.connect_ex = _CONNECT_EX
    socket.socket.sendto = _SENDTO
    socket.getaddrinfo = _GETADDRINFO
