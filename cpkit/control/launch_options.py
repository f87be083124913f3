"""The options of a set of workers, passed from the launcher to the agent and to the ranks."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Literal

import msgspec
import psutil

from cpkit.control.module_file import read_module
from cpkit.control.requests import Message
from cpkit.packing import describe_types
from cpkit.processes import ProcessId
from cpkit.settings import LAUNCH, pass_on, passed_on

_MOST_RANKS = 256  # on one machine


class Launch(Message, frozen=True):
    """The options of one set of workers. No secrets: other users can read a process's arguments."""

    name: str = "default"
    nproc: int = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""
    interface: str = ""
    max_restarts: int = 0
    share_gpu: bool = False
    owner: ProcessId | None = None
    algorithms: str = ""  # the absolute path of a Python file

    @property
    def runtime_dir_name(self) -> str:
        """Name of this node's runtime directory; different per node, as nodes may share a home."""
        return self.name if self.node_rank == 0 else f"{self.name}.node{self.node_rank}"

    def check(self) -> None:
        """Raise ValueError for an invalid option, with what is allowed."""
        if type(self.nproc) is not int or not 1 <= self.nproc <= _MOST_RANKS:
            raise ValueError(
                f"nproc is {self.nproc!r}; it must be a whole number, 1 to {_MOST_RANKS} ranks on "
                f"this machine"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu or cuda")
        if self.nnodes < 1 or not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"--nnodes is {self.nnodes} and --node-rank is {self.node_rank}; "
                f"node ranks are 0 to nnodes-1"
            )
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts is {self.max_restarts}; it must be 0 or more")
        if self.nnodes > 1 and not _is_host_and_port(self.rdzv_endpoint):
            raise ValueError(
                f"--rdzv-endpoint is {self.rdzv_endpoint!r}; with --nnodes {self.nnodes} all nodes "
                f"must use the same host:port of node 0, for example node0:29500"
            )
        if self.share_gpu and self.device == "cpu":
            raise ValueError("--share-gpu and --device cpu contradict each other; leave one out")
        if self.algorithms:
            read_module(self.algorithms)
        if self.interface and not (self.node_rank > 0 and self.interface[0].isdigit()):
            address_of(self.interface)

    def to_json(self) -> str:
        """Encode the options for an argument or the environment."""
        return msgspec.json.encode(self).decode()

    def export(self) -> None:
        """Pass the options to the processes that this one starts."""
        pass_on(LAUNCH, self.to_json())


def from_json(text: str) -> Launch:
    """Decode what `to_json` encoded."""
    return msgspec.json.decode(text, type=Launch)


def from_environment() -> Launch | None:
    """Return the options that the agent exported, or None if no agent started this process."""
    text = passed_on(LAUNCH)
    return from_json(text) if text else None


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface, or the address given.

    Raises ValueError unless it belongs to this machine.
    """
    with contextlib.suppress(ValueError, OSError):  # another machine's address cannot be bound
        host = ipaddress.ip_address(interface)
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        socket.create_server((str(host), 0), family=family).close()
        return str(host)
    interfaces = psutil.net_if_addrs()
    for address in interfaces.get(interface, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    raise ValueError(
        f"--interface is {interface!r}; this machine has {', '.join(sorted(interfaces))}. "
        f"Name one that has an IPv4 address, or give an address of this machine."
    )


def loopback() -> str:
    """Return the name of the interface that has 127.0.0.1, or an empty string."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return ""


def _is_host_and_port(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


describe_types(Launch)
