"""The Triton kernel of `direct` on CUDA: copy tiles into all peers' outputs, and synchronize.

A rank loads each tile once, and stores it at its final place in every peer's output:

    rank 0   signal entry ─ wait for all ─ copy tiles ─┐ last block: signal exit ─ wait for all
    rank 1      signal entry ─ wait for all ─ copy tiles ─┐ last block: signal exit ─ wait for all
                               ↑ every peer's output is free                 all rows have arrived ↑

Launched without tiles, it is an entry or an exit alone, of one block (see cpkit.kernels.launch).

Each rank has a page of words in symmetric memory: two entry and two exit words per peer, its last
epoch, its blocks that have arrived, its next tile, and whether it has stopped. The entry and exit
words count gathers (*epochs*) and only grow, so that peers never wait for a reset. A captured graph
can be replayed, because the kernel reads the last epoch itself and increments it.

A signal is the epoch and the *tag* of the call, which is equal on all ranks in one call. A rank
that receives another tag is in another call than its peer, so that rows are missing: it reports
that, and its later launches store nothing. Even and odd epochs use different words, or a peer that
has left already could overwrite its signal by that of its next call before this rank reads it.

Memory ordering follows PTX: a block's stores precede its barrier, then the release of its arrival,
then the release (system scope) of the exit signal, which a peer acquires.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cpkit.kernels.tiles import COLUMNS

MAX_RANKS = 128
ENTRY, EXIT = 0, 2 * MAX_RANKS  # each for even epochs, then for odd ones
EPOCH, ARRIVED, TICKET, BROKEN = range(4 * MAX_RANKS, 4 * MAX_RANKS + 4)
PAGE_WORDS = 1024
TAG_BITS = 24
DIFFERS = 256  # a reported rank plus 1 plus this is in another call; without this, it is late

_ENTRY, _EXIT = tl.constexpr(ENTRY), tl.constexpr(EXIT)
_EPOCH, _ARRIVED = tl.constexpr(EPOCH), tl.constexpr(ARRIVED)
_TICKET, _BROKEN = tl.constexpr(TICKET), tl.constexpr(BROKEN)
_RANKS, _DIFFERS = tl.constexpr(MAX_RANKS), tl.constexpr(DIFFERS)
_TAG_BITS = tl.constexpr(TAG_BITS)
_COLUMNS = tl.constexpr(len(COLUMNS))

_SIGNAL = """
{
  .reg .pred %p<1>;
  setp.ne.s32 %p0, $3, 0;
  @%p0 st.release.sys.global.b64 [$1], $2;
  mov.u32 $0, 0;
}
"""
# Spins until the word at $1 has reached the epoch of $2. $0 is 1 when that took longer than $3
# nanoseconds, and 2 when the word has another tag.
_WAIT = f"""
{{
  .reg .pred %p<2>;
  .reg .b64 %v, %epoch, %start, %now;
  mov.u32 $0, 0;
  setp.eq.s32 %p0, $4, 0;
  @%p0 bra done;
  and.b64 %epoch, $2, {-1 << TAG_BITS};
  mov.u64 %start, %globaltimer;
poll:
  ld.acquire.sys.global.b64 %v, [$1];
  setp.ge.s64 %p0, %v, %epoch;
  @%p0 bra compare;
  mov.u64 %now, %globaltimer;
  sub.s64 %now, %now, %start;
  setp.lt.s64 %p1, %now, $3;
  @%p1 bra poll;
  mov.u32 $0, 1;
  bra done;
compare:
  setp.ne.s64 %p1, %v, $2;
  @%p1 mov.u32 $0, 2;
done:
}}
"""
_SIGNAL_ASM, _WAIT_ASM = tl.constexpr(_SIGNAL), tl.constexpr(_WAIT)


@triton.jit
def _signal_peers(pages, word, signal, CP: tl.constexpr, THREADS: tl.constexpr):
    """Store `signal` in word `word` of every rank's page, after all earlier work of this block."""
    lanes = tl.arange(0, THREADS)
    active = lanes < CP
    page = tl.load(pages + lanes, mask=active, other=0)
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        _SIGNAL_ASM,
        "=r,l,l,r",
        [page + word * 8, tl.full([THREADS], 0, tl.int64) + signal, active.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _wait_for_peers(words, word, signal, timeout_ns, CP: tl.constexpr, THREADS: tl.constexpr):
    """Wait until every peer has stored `signal`; return what `_report` expects."""
    lanes = tl.arange(0, THREADS)
    active = lanes < CP
    problem = tl.inline_asm_elementwise(
        _WAIT_ASM,
        "=r,l,l,l,r",
        [
            words.to(tl.int64) + (word + lanes) * 8,
            tl.full([THREADS], 0, tl.int64) + signal,
            tl.full([THREADS], 0, tl.int64) + timeout_ns,
            active.to(tl.int32),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    worst = tl.max(tl.where(problem > 0, lanes + 1 + (problem - 1) * _DIFFERS, 0), axis=0)
    tl.debug_barrier()
    return worst


@triton.jit
def _select(values, number, COUNT: tl.constexpr):
    """Return values[number] for a number that is not known at compile time."""
    chosen = values[0].to(tl.int64)
    for k in tl.static_range(1, COUNT):
        chosen = tl.where(number == k, values[k].to(tl.int64), chosen)
    return chosen


@triton.jit
def _pointer(address, WORD: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Convert an address to a pointer marked as aligned, so that Triton emits vector accesses."""
    return tl.multiple_of(address.to(tl.pointer_type(WORD)), ALIGNMENT)


@triton.jit
def _copy_tile(
    source,
    bases,
    offset,
    slots,
    tile,
    rank,
    is_mapped,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Copy one tile: BLOCK words into registers, then to every peer, the next rank first."""
    run, first, count = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    token, step, row_units = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    i = tl.arange(0, BLOCK)
    inside = i < tl.multiple_of(count.to(tl.int32), VECTOR)
    words = tl.load(
        _pointer(source + (run + first) * BYTES, WORD, VECTOR * BYTES) + i,
        mask=inside,
    )
    if is_mapped:
        position = first.to(tl.int32) + i
        row = position // row_units.to(tl.int32)
        column = position - row * row_units.to(tl.int32)
        target_row = token + row.to(tl.int64) * step
        pitch = row_units
        if SLOTS:
            pitch = tl.load(tile + 8)
            target_row = tl.load(slots + target_row, mask=inside, other=-1)
            inside = inside & (target_row >= 0)
        target = target_row * pitch + column
        target = tl.max_contiguous(tl.multiple_of(target, VECTOR), VECTOR)
        inside = tl.max_constancy(inside, VECTOR)
        for k in tl.static_range(CP):
            base = tl.load(bases + (rank + 1 + k) % CP) + offset
            tl.store(
                _pointer(base, WORD, VECTOR * BYTES) + target,
                words,
                mask=inside,
                cache_modifier=".cs",
            )
    else:
        shift = (token * row_units + first) * BYTES + offset
        for k in tl.static_range(CP):
            base = tl.load(bases + (rank + 1 + k) % CP) + shift
            tl.store(
                _pointer(base, WORD, VECTOR * BYTES) + i, words, mask=inside, cache_modifier=".cs"
            )


@triton.jit
def _copy_tiles(
    sources,
    targets,
    bases,
    slots,
    tiles,
    n_tiles,
    ticket,
    rank,
    TENSORS: tl.constexpr,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Copy tiles; a block that has finished one takes the next.

    This keeps the blocks of a rank close together in its memory. With a fixed stride of n tiles for
    each of n blocks, they drift apart, and the same copies take 8 % longer (H200).
    """
    number = tl.program_id(0)
    while number < n_tiles:
        tile = tiles + number * _COLUMNS
        kind, tensor = tl.load(tile), tl.load(tile + 1)
        source = _select(sources, tensor, TENSORS)
        table = _select(bases, tensor, TENSORS).to(tl.pointer_type(tl.int64))
        offset = _select(targets, tensor, TENSORS) - tl.load(table + rank)
        if kind < 2:
            _copy_tile(
                source, table, offset, slots, tile, rank, kind == 1,
                CP, BLOCK, tl.int64, 8, 2, SLOTS,
            )  # fmt: skip
        elif NARROW is not None:
            _copy_tile(
                source, table, offset, slots, tile, rank, kind == 3,
                CP, BLOCK, NARROW, NARROW.primitive_bitwidth // 8, 1, SLOTS,
            )  # fmt: skip
        taken = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
        number = taken.to(tl.int32) + tl.num_programs(0)


@triton.jit
def _report(words, report, problem):
    """Report a rank's number plus 1 (plus DIFFERS if it is in another call; 0 for no problem).

    This rank's later launches then do nothing: they would store and signal in an epoch or a call
    that its peers are not in.
    """
    if problem > 0:
        tl.store(report, problem)
        tl.store(words + _BROKEN, 1)


@triton.jit
def _leave(
    pages, words, epoch, tag, rank, report, timeout_ns,
    CP: tl.constexpr, EXIT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """In the last block that arrives, signal that this rank's rows have arrived, and wait for all.

    When a block timed out at the entry, rows are missing: it signals no peer, and all time out.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(words + _ARRIVED, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.store(words + _ARRIVED, 0)
        tl.store(words + _TICKET, 0)
        if EXIT:
            if tl.load(words + _BROKEN, volatile=True) == 0:
                word = _EXIT + epoch % 2 * _RANKS
                signal = (epoch << _TAG_BITS) + tag
                _signal_peers(pages, word + rank, signal, CP, THREADS)
                problem = _wait_for_peers(words, word, signal, timeout_ns, CP, THREADS)
                _report(words, report, problem)
                tl.store(words + _EPOCH, epoch)


# Triton recompiles when an integer exceeds 32 bits or changes its alignment; peers would wait for
# that, or a capture would fail. So buffers are passed as addresses, which always need 64 bits (only
# 0, for no rows, is a separate variant), and not as offsets in a segment.
@triton.jit(
    do_not_specialize=["n_tiles", "rank", "timeout_ns", "tag"],
    do_not_specialize_on_alignment=["slots"],
)
def gather_kernel(
    sources,
    targets,
    bases,
    slots,
    tiles,
    n_tiles,
    pages,
    report,
    timeout_ns: tl.int64,
    rank,
    tag,
    TENSORS: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
    SLOTS: tl.constexpr, ENTRY: tl.constexpr, EXIT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Store this rank's tiles into all peers' outputs.

    sources   addresses of this rank's rows, one per tensor
    targets   addresses of this rank's outputs, at the same offset in their segments on all ranks
    bases     addresses of tables `[CP]` of the ranks' segments that these outputs are in
    slots     int64 `[total_tokens]`, the row that each token goes to (with SLOTS)
    tiles     int64 `[n_tiles, len(COLUMNS)]`, see cpkit.kernels.tiles
    pages     addresses `[CP]` of the ranks' pages of signal words
    report    one word of host memory, for `_report`
    tag       number of the call, equal on all ranks in one call; below 2**TAG_BITS
    ENTRY     signal and wait at the entry; off when all outputs are known to be free
    EXIT      signal and wait at the exit (the interpreter can do neither)
    """
    words = tl.load(pages + rank).to(tl.pointer_type(tl.int64))
    epoch = tl.load(words + _EPOCH, volatile=True) + 1
    if ENTRY:
        # Atomic, because another block may write it now, and all threads need the same value.
        stop = tl.atomic_or(words + _BROKEN, 0, sem="relaxed", scope="gpu").to(tl.int32)
        if stop == 0:
            word = _ENTRY + epoch % 2 * _RANKS
            signal = (epoch << _TAG_BITS) + tag
            if tl.program_id(0) == 0:
                _signal_peers(pages, word + rank, signal, CP, THREADS)
            stop = _wait_for_peers(words, word, signal, timeout_ns, CP, THREADS)
            _report(words, report, stop)
    else:
        stop = tl.load(words + _BROKEN, volatile=True).to(tl.int32)
    if stop > 0:  # what was reported, or 1 where this rank has stopped
        n_tiles = 0
    _copy_tiles(
        sources, targets, bases, slots, tiles, n_tiles, words + _TICKET, rank,
        TENSORS, CP, BLOCK, NARROW, SLOTS,
    )  # fmt: skip
    _leave(pages, words, epoch, tag, rank, report, timeout_ns, CP, EXIT, THREADS)
