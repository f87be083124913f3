"""What decides the path of a rank's NCCL besides the buffers: its version and its settings.

Every rank selects on its own. If the ranks select differently, they wait for each other forever or
store to wrong places:

| different on the ranks | what NCCL does | what cpkit does |
|---|---|---|
| version | refuses to connect them (ncclInvalidUsage) | raises ValueError before that |
| `NCCL_WIN_ENABLE=0` or `NCCL_CUMEM_ENABLE=0` | no windows there | no rank registers windows |
| `NCCL_CTA_POLICY` | symmetric kernel here, copy engine there | no rank registers windows |

So the ranks exchange these settings once per job, when they find each other. Without windows NCCL
uses its ring, and the path report has the reason. Variables that are set in NCCL's configuration
file (/etc/nccl.conf) are not seen here. Source: NCCL's init.cc, 2.27 to 2.30.7 (symmetricSupport,
the versions in peerInfo, getEnvCtaPolicyOnce).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from cpkit.devices import loaded_nccl_version
from cpkit.memory.path import (
    COPY_ENGINE_FAILS,
    NCCL_COPY_ENGINE,
    ZERO_POLICY,
    Version,
    copy_engine_fails,
)
from cpkit.packing import describe_types

Policy = Literal["default", "efficiency", "zero"]


class NcclSettings(msgspec.Struct, frozen=True):
    """The NCCL of one rank; `version` is empty where there is none.

    `windows_off` is the variable that switches its windows off, for example "NCCL_WIN_ENABLE=0".
    """

    version: Version = ()
    windows_off: str = ""
    policy: Policy = "default"

    @property
    def transport(self) -> str:
        """This NCCL as a transport (cpkit.memory.path), for example "nccl 2.28.9"."""
        return f"nccl {_dotted(self.version)}" + (ZERO_POLICY if self.policy == "zero" else "")


def settings_of_this_process() -> NcclSettings:
    """Return the version of the loaded NCCL, and what its variables mean to it. Local."""
    version = loaded_nccl_version()
    variables = {
        "NCCL_WIN_ENABLE": os.environ.get("NCCL_WIN_ENABLE", ""),
        "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", ""),
    }
    off = [f"{name}={value}" for name, value in variables.items() if is_zero(value)]
    policy = cta_policy(os.environ.get("NCCL_CTA_POLICY", ""), version)
    return NcclSettings(version, " and ".join(off), policy)


def is_zero(value: str) -> bool:
    """Return True when NCCL reads this text as the number 0, as it reads words such as "off".

    >>> is_zero("0"), is_zero("off"), is_zero("1"), is_zero("")
    (True, True, False, False)
    """
    return bool(value) and not re.match(r"\s*[-+]?(0*[1-9]|0x0*[1-9a-f])", value.lower())


def cta_policy(value: str, version: Version) -> Policy:
    """Return what this NCCL makes of NCCL_CTA_POLICY: a digit, or from 2.29 on names joined by |.

    >>> cta_policy("2", (2, 28, 9)), cta_policy("ZERO", (2, 30, 7)), cta_policy("2", (2, 27, 7))
    ('zero', 'zero', 'default')
    """
    names = value.upper().split("|") if version >= (2, 29) else []
    if version >= NCCL_COPY_ENGINE and (value[:1] == "2" or "ZERO" in names):
        return "zero"
    return "efficiency" if value[:1] == "1" or "EFFICIENCY" in names else "default"


def check_versions(by_rank: Mapping[int, NcclSettings]) -> None:
    """Check that the ranks of a group have one version of NCCL. Raises ValueError."""
    versions = {rank: _dotted(settings.version) for rank, settings in by_rank.items()}
    if len(set(versions.values())) > 1:
        raise ValueError(
            f"NCCL connects only ranks with one version of it ({_listed(versions)}): start all "
            f"ranks in one environment, with the same nvidia-nccl package and LD_PRELOAD"
        )


def window_problem(by_rank: Mapping[int, NcclSettings]) -> str:
    """Return why these ranks must not register windows with NCCL; empty when they can.

    The same on every rank, because all ranks have the settings of all ranks.
    """
    off = {rank: each.windows_off for rank, each in by_rank.items()}
    if any(off.values()):
        named = {rank: text or "on" for rank, text in off.items()}
        return f"NCCL's symmetric windows are off ({_listed(named)}): unset that on all ranks"
    policies = {rank: each.policy for rank, each in by_rank.items()}
    if len(set(policies.values())) > 1:
        return (
            f"NCCL_CTA_POLICY differs ({_listed(policies)}), so ranks with windows would select "
            f"different algorithms: set it alike on all ranks"
        )
    first = next(iter(by_rank.values()))
    return COPY_ENGINE_FAILS if first.policy == "zero" and copy_engine_fails(first.version) else ""


def _listed(texts: Mapping[int, str]) -> str:
    """List each text once, with its ranks.

    >>> _listed({0: "on", 1: "off", 2: "on"}), _listed({0: "on", 1: "on"})
    ('rank(s) 0, 2: on; rank(s) 1: off', 'all ranks: on')
    """
    ranks_of: dict[str, list[str]] = {}
    for rank, text in texts.items():
        ranks_of.setdefault(text, []).append(str(rank))
    if len(ranks_of) == 1:
        return f"all ranks: {next(iter(ranks_of))}"
    return "; ".join(f"rank(s) {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())


def _dotted(version: Version) -> str:
    return ".".join(map(str, version)) or "none"


describe_types(NcclSettings)
