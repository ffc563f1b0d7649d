"""The address at which the other processes find this one.

On CPUs JAX adds up arrays through gloo, which offers the others the address that this host's own name has here. Debian
and Ubuntu write 127.0.1.1 there, which leads nowhere from another host. So gloo is told the address that this host has
on the way to another process.
"""

import contextlib
import functools
import socket
from typing import Any, Iterator

from effnet_repro.distributed.ranks import Ranks

_KEY, _MILLISECONDS = "effnet/address", 60_000


def address_towards(host: str, port: int = 9) -> str:
    """Return the address of this host on the way to another one, or "" where there is no way. Nothing is sent."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as way:
            way.connect(there)
            return way.getsockname()[0]
    except OSError:
        return ""


def own_address(ranks: Ranks, client: Any) -> str:
    """Return the address at which the others find this process, or ""; all ask at the same time.

    Process 0 knows its own name only, the others know where process 0 is: it takes the way to one of them. `client` is
    that of JAX's distributed runtime.
    """
    if ranks.index:
        address = address_towards(ranks.coordinator.rpartition(":")[0].strip("[]"))
        client.key_value_set(f"{_KEY}/{ranks.index}", address)
        return address
    other = client.blocking_key_value_get(f"{_KEY}/1", _MILLISECONDS)
    return address_towards(other) if other else ""


@contextlib.contextmanager
def offered(address: str) -> Iterator[None]:
    """Let gloo offer this address where JAX begins to use its devices in the `with` statement; "" changes nothing."""
    from jax._src import xla_bridge

    library = getattr(xla_bridge, "_jax", None)
    make = getattr(library, "make_gloo_tcp_collectives", None)
    if make is None or not address:  # make: another version of JAX asks for the host's name
        yield
        return
    library.make_gloo_tcp_collectives = functools.partial(make, hostname=address)
    try:
        yield
    finally:
        library.make_gloo_tcp_collectives = make
