"""One random case, drawn from its seed alone. Pure: no processes, no cpkit.

The last digit of a seed selects the number of ranks, so that a seed is enough to replay its case.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

WORLD_BY_DIGIT = (2, 3, 4, 2, 3, 4, 5, 8, 1, 2)
WORLDS = tuple(sorted(set(WORLD_BY_DIGIT)))
STRATEGIES = ("zigzag", "interleave", "contiguous")
ALGORITHMS = ("direct", "padded", "padded_symm", "padded_symm_recv")
# Every dtype that torch can store, except quantized ones, whose values are not their bytes.
DTYPES = tuple(
    sorted(
        {
            dtype
            for dtype in vars(torch).values()
            if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
        },
        key=str,
    )
)
COMMON_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8)
NEGATABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
CONJUGATED = (torch.complex64, torch.complex128)
TRAILING = (
    (),
    (0,),
    (4, 0, 2),
    (1,),
    (1, 1),
    (3,),
    (5, 7),
    (33,),
    (66,),  # 132 bytes of bfloat16
    (132,),
    (1, 5),
    (2, 64),
    (576,),  # MLA's latent
    (1, 576),
    (8, 16),
    (8, 128),  # GQA
)
CALLS = ("gather", "gather", "into", "plan", "rank_order", "token_order", "shards")
FAULTS = {
    "gather": (
        *("rows", "algorithm", "sparse", "no tensor", "empty list", "stream", "grad", "meta"),
        *("dtype", "trailing", "lengths", "symmetry"),
    ),
    "into": ("rows", "slot too large", "slot twice", "no slots", "cache shape", "slots differ"),
    "plan": ("rows", "algorithm", "keep", "strided", "dtype", "lengths"),
    "rank_order": ("rows", "cp_size", "total_len", "stream", "sparse", "trailing"),
    "token_order": ("rows", "cp_size", "total_len", "stream", "no tensor", "dtype"),
    "shards": ("output", "no tensor", "dtype", "trailing"),
}
ONLY_AMONG_RANKS = ("dtype", "trailing", "lengths", "symmetry", "slots differ")
_LARGE_ROW = (65541,)  # bytes: a shard of several rows is cut into tiles of 1 MiB


@dataclass(frozen=True)
class Kind:
    """What one tensor is on every rank; `same` says along what its values are equal."""

    dtype: torch.dtype
    trailing: tuple[int, ...]
    same: str = ""  # "", "rows" or "last"
    lazy: str = ""  # "", "neg" or "conj": ranks may pass lazily negated or conjugated views
    in_pool: bool = False


@dataclass(frozen=True)
class Case:
    """A call with its arguments, the number of gathers, and what rank `bad_rank` passes wrongly."""

    seed: int
    cp_size: int
    strategy: str
    lengths: tuple[int, ...]
    kinds: tuple[Kind, ...]
    call: str
    algorithm: str
    symmetric: bool
    gathers: int
    keep: int
    skipped: float  # fraction of the tokens whose slot is -1
    output_in_pool: bool
    in_place: bool
    poisons_ordinary: bool
    fault: str = ""
    bad_rank: int = 0


def world_of(seed: int) -> int:
    """Return the number of ranks of the case with this seed."""
    return WORLD_BY_DIGIT[seed % 10]


def draw(seed: int) -> Case:
    """Draw the case of a seed."""
    rng = random.Random(f"case {seed}")
    world = world_of(seed)
    cp_size = rng.choice([n for n in range(1, world + 1) if world % n == 0] + [world] * 3)
    call = rng.choice(CALLS)
    is_large = rng.random() < 0.004 and call != "shards"
    strategy = rng.choice(STRATEGIES)
    count = rng.randint(1, 4) if call in ("gather", "into", "plan") and not is_large else 1
    kinds = [Kind(torch.uint8, _LARGE_ROW)] if is_large else [_kind(rng) for _ in range(count)]
    faults = [f for f in FAULTS[call] if cp_size > 1 or f not in ONLY_AMONG_RANKS]
    return Case(
        seed,
        cp_size,
        strategy,
        _lengths(rng, strategy, cp_size, is_large=is_large),
        tuple(kinds),
        call,
        rng.choice(ALGORITHMS),
        symmetric=rng.random() < 0.85,
        gathers=rng.randint(2, 6) if call == "plan" else rng.randint(1, 3),
        keep=rng.randint(1, 2),
        skipped=rng.choice((0.0, 0.0, 0.2, 1.0)),
        output_in_pool=rng.random() < 0.5,
        in_place=rng.random() < 0.2,
        poisons_ordinary=rng.random() < 0.5,
        fault=rng.choice(faults) if rng.random() < 0.1 else "",
        bad_rank=rng.randrange(cp_size),
    )


def _kind(rng: random.Random) -> Kind:
    dtype = rng.choice(DTYPES if rng.random() < 0.7 else COMMON_DTYPES)
    same = rng.choice(("", "", "", "rows", "last"))
    trailing = rng.choice(TRAILING)
    lazy = ""
    if dtype in NEGATABLE and rng.random() < 0.3:
        lazy = "neg"
    elif dtype in CONJUGATED and rng.random() < 0.6:
        lazy = "conj"
    return Kind(dtype, trailing, "" if not trailing else same, lazy, rng.random() < 0.1)


def _lengths(rng: random.Random, strategy: str, cp_size: int, *, is_large: bool) -> tuple[int, ...]:
    shortest = 2 * cp_size if strategy == "zigzag" and cp_size > 1 else 1
    if is_large:
        return (rng.randint(max(shortest, 17 * cp_size), 40 * cp_size),)
    longest = rng.choice((shortest, shortest + 3, shortest + 20, shortest + 60))
    return tuple(rng.randint(shortest, longest) for _ in range(rng.choice((1, 1, 2, 3, 5))))
