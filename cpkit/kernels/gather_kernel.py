"""The Triton kernel of `direct` on CUDA: copy tiles into all peers' outputs, and synchronize.

A rank loads each tile once, and stores it at its final place in every peer's output:

    rank 0   signal entry ─ first tile ─ wait for all ─ copy tiles ─┐ last block: exit, as at entry
    rank 1      signal entry ─ first tile ─ wait for all ─ copy tiles ─┐ last block: exit …
                                            ↑ every peer's output is free      ↑ its rows are stored

While the entry signals travel, each block loads its first tile. It stores nothing before they have
arrived, also not into this rank's own output: a peer may still read that (SymmetricPool.peer_view).

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
then the release (system scope) of the exit signal, which a peer acquires. The entry signal of a
gather releases nothing: peers only store after it, and this rank's earlier kernels have ended when
this one starts. An entry alone is a release, because peers may load this rank's shard after it.
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
_STOPPED = tl.constexpr(1 << 20)  # added to ARRIVED by a block that has stopped, above any count
_COLUMNS = tl.constexpr(len(COLUMNS))

_SIGNAL = """
{
  .reg .pred %p<1>;
  setp.ne.s32 %p0, $3, 0;
  @%p0 st.ORDER.sys.global.b64 [$1], $2;
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
_RELEASE = tl.constexpr(_SIGNAL.replace("ORDER", "release"))
_RELAXED = tl.constexpr(_SIGNAL.replace("ORDER", "relaxed"))
_WAIT_ASM = tl.constexpr(_WAIT)


@triton.jit
def _signal_peers(
    pages, word, signal, CP: tl.constexpr, THREADS: tl.constexpr, SIGNAL: tl.constexpr
):
    """Store `signal` in word `word` of every rank's page, at the addresses `pages`.

    With _RELEASE, after all earlier stores of this block.
    """
    active = tl.arange(0, THREADS) < CP
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        SIGNAL,
        "=r,l,l,r",
        [pages + word * 8, tl.full([THREADS], 0, tl.int64) + signal, active.to(tl.int32)],
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
def _report(words, report, problem):
    """Report a rank's number plus 1 (plus DIFFERS if it is in another call; 0 for no problem).

    This rank's later launches then do nothing: they would store and signal in an epoch or a call
    that its peers are not in.
    """
    if problem > 0:
        tl.store(report, problem)
        tl.store(words + _BROKEN, 1)


@triton.jit
def _enter(
    words, epoch, tag, report, timeout_ns, waits,
    CP: tl.constexpr, THREADS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """With `waits`, wait for the entry signals of all peers; report and return a problem, or 0."""
    problem = 0
    if ENTRY:
        if waits:
            word, signal = _ENTRY + epoch % 2 * _RANKS, (epoch << _TAG_BITS) + tag
            problem = _wait_for_peers(words, word, signal, timeout_ns, CP, THREADS)
            _report(words, report, problem)
    return problem


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
    source, target, table, slots, tile, is_mapped, rank,
    words, epoch, tag, report, timeout_ns, waits,
    CP: tl.constexpr, BLOCK: tl.constexpr, WORD: tl.constexpr, BYTES: tl.constexpr,
    VECTOR: tl.constexpr, SLOTS: tl.constexpr, ENTRY: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Copy one tile: BLOCK words into registers, then to the output of every rank.

    The stores begin with this rank's own output, then come the next rank's and so on. With `waits`,
    they wait at the entry, after the loads; returns what `_enter` does, and stores nothing if that
    is a problem.
    """
    run, first, count = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    token, step, row_units = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    offset = target - tl.load(table + rank)
    base = tl.load(table + (rank + 1) % CP)  # now, because the wait below takes longer
    i = tl.arange(0, BLOCK)
    inside = i < tl.multiple_of(count.to(tl.int32), VECTOR)
    data = tl.load(_pointer(source + (run + first) * BYTES, WORD, VECTOR * BYTES) + i, mask=inside)
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
        place = target_row * pitch + column
        place = tl.max_contiguous(tl.multiple_of(place, VECTOR), VECTOR)
        inside = tl.max_constancy(inside, VECTOR)
        problem = _enter(words, epoch, tag, report, timeout_ns, waits, CP, THREADS, ENTRY)
        if problem == 0:
            own = _pointer(target, WORD, VECTOR * BYTES) + place
            tl.store(own, data, mask=inside, cache_modifier=".cs")
            for k in tl.static_range(CP - 1):
                peer = _pointer(base + offset, WORD, VECTOR * BYTES) + place
                tl.store(peer, data, mask=inside, cache_modifier=".cs")
                base = tl.load(table + (rank + 2 + k) % CP)
    else:
        start = (token * row_units + first) * BYTES
        problem = _enter(words, epoch, tag, report, timeout_ns, waits, CP, THREADS, ENTRY)
        if problem == 0:
            own = _pointer(target + start, WORD, VECTOR * BYTES) + i
            tl.store(own, data, mask=inside, cache_modifier=".cs")
            for k in tl.static_range(CP - 1):
                peer = _pointer(base + offset + start, WORD, VECTOR * BYTES) + i
                tl.store(peer, data, mask=inside, cache_modifier=".cs")
                base = tl.load(table + (rank + 2 + k) % CP)
    return problem


@triton.jit
def _copy_tiles(
    sources, targets, bases, slots, tiles, n_tiles, rank,
    words, epoch, tag, report, timeout_ns,
    TENSORS: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
    SLOTS: tl.constexpr, ENTRY: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Copy tiles; a block that has finished one takes the next. Returns a problem at the entry.

    This keeps the blocks of a rank close together in its memory. With a fixed stride of n tiles for
    each of n blocks, they drift apart, and the same copies take 8 % longer (H200).
    """
    number = tl.program_id(0)
    waits = ENTRY
    problem = 0
    while number < n_tiles:
        tile = tiles + number * _COLUMNS
        kind, tensor = tl.load(tile), tl.load(tile + 1)
        source = _select(sources, tensor, TENSORS)
        target = _select(targets, tensor, TENSORS)
        table = _select(bases, tensor, TENSORS).to(tl.pointer_type(tl.int64))
        if kind < 2:
            problem = _copy_tile(
                source, target, table, slots, tile, kind == 1, rank,
                words, epoch, tag, report, timeout_ns, waits,
                CP, BLOCK, tl.int64, 8, 2, SLOTS, ENTRY, THREADS,
            )  # fmt: skip
        elif NARROW is not None:
            problem = _copy_tile(
                source, target, table, slots, tile, kind == 3, rank,
                words, epoch, tag, report, timeout_ns, waits,
                CP, BLOCK, NARROW, NARROW.primitive_bitwidth // 8, 1, SLOTS, ENTRY, THREADS,
            )  # fmt: skip
        waits = False
        taken = tl.atomic_add(words + _TICKET, 1, sem="relaxed", scope="gpu")
        number = taken.to(tl.int32) + tl.num_programs(0)
        if problem > 0:
            number = n_tiles
    if n_tiles == 0:
        problem = _enter(words, epoch, tag, report, timeout_ns, waits, CP, THREADS, ENTRY)
    return problem


@triton.jit
def _leave(
    pages, words, epoch, tag, rank, report, timeout_ns, stop,
    CP: tl.constexpr, EXIT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """In the last block that arrives, signal that this rank's rows have arrived, and wait for all.

    When a block has stopped, rows are missing: it signals no peer, and all time out.
    """
    tl.debug_barrier()
    mine = tl.where(stop > 0, _STOPPED + 1, 1).to(tl.int64)
    arrived = mine + tl.atomic_add(words + _ARRIVED, mine, sem="acq_rel", scope="gpu")
    if arrived % _STOPPED == tl.num_programs(0):
        tl.store(words + _ARRIVED, 0)
        tl.store(words + _TICKET, 0)
        if EXIT:
            if arrived < _STOPPED:
                word = _EXIT + epoch % 2 * _RANKS
                signal = (epoch << _TAG_BITS) + tag
                _signal_peers(pages, word + rank, signal, CP, THREADS, _RELEASE)
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
    page,
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
    page      address of this rank's page of signal words
    pages     addresses `[CP]` of the ranks' pages
    report    one word of host memory, for `_report`
    tag       number of the call, equal on all ranks in one call; below 2**TAG_BITS
    ENTRY     signal and wait at the entry; off when the peers' outputs are known to be free
    EXIT      signal and wait at the exit (the interpreter can do neither)
    """
    words = page.to(tl.pointer_type(tl.int64))
    lanes = tl.arange(0, THREADS)
    peers = tl.load(pages + lanes, mask=lanes < CP, other=0)
    epoch = tl.load(words + _EPOCH, volatile=True) + 1
    # All threads need one value, and another block may write the word now: hence the maximum.
    stop = tl.max(tl.load(words + _BROKEN + 0 * lanes, volatile=True), axis=0).to(tl.int32)
    if stop == 0:
        if ENTRY:
            if tl.program_id(0) == 0:
                word, signal = _ENTRY + epoch % 2 * _RANKS, (epoch << _TAG_BITS) + tag
                if EXIT:
                    _signal_peers(peers, word + rank, signal, CP, THREADS, _RELAXED)
                else:
                    _signal_peers(peers, word + rank, signal, CP, THREADS, _RELEASE)
        stop = _copy_tiles(
            sources, targets, bases, slots, tiles, n_tiles, rank,
            words, epoch, tag, report, timeout_ns,
            TENSORS, CP, BLOCK, NARROW, SLOTS, ENTRY, THREADS,
        )  # fmt: skip
    _leave(peers, words, epoch, tag, rank, report, timeout_ns, stop, CP, EXIT, THREADS)
