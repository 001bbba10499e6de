"""Compiled loops of byte-level BPE: split text into words, count them, learn merges, encode.

    text = pad_text([b"hello hello"])
    words = add_documents(empty_words(), text, np.array([0, 11]), splitter)

A text is one buffer of UTF-8 bytes followed by `PADDING` zeros, so that 8 bytes may be read anywhere; documents lie in it
end to end. Tables are arrays in a namedtuple. What looks odd has a reason: in numba uint64 with int64 gives a float, a
signed index costs a check for < 0, assigning to a slice costs a second of compilation, and each access to an attribute of a
namedtuple costs two atomic operations on a reference count, so inner loops take arrays.

numba compiles a kernel at its first call, some seconds each, and caches the machine code in `__pycache__`. A slow, obvious
twin of each loop stands in tests/test_bpe.py.
"""
from collections import namedtuple

import numpy as np
from llvmlite import ir
from numba import int64, njit, types, uint8, uint32, uint64
from numba.extending import intrinsic

compiled = njit(nogil=True)


def kernel(function):
    """For functions that Python calls: without the GIL, so that threads encode in parallel; compiled once per machine."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to cache the machine code in: every process compiles its own
        return compiled(function)


WINDOW = 64       # bytes that the scanner looks at together: the bits of a number
PADDING = WINDOW
BLOCK = 1024      # words scanned at a time, so that the memory accesses of their look-ups overlap


def pad_text(parts: list[bytes | np.ndarray]) -> np.ndarray:
    """`parts` end to end, followed by PADDING zeros. (bytes + PADDING,) uint8."""
    return np.frombuffer(bytearray().join([*parts, bytes(PADDING)]), np.uint8)


# -- bytes ------------------------------------------------------------------------------------------------------------


@compiled
def load8(text, at):
    """8 bytes as a little-endian number. LLVM turns it into a single load; unsigned indices need no check for < 0."""
    i = uint64(at)
    return (uint64(text[i]) | uint64(text[i + uint64(1)]) << uint64(8) | uint64(text[i + uint64(2)]) << uint64(16)
            | uint64(text[i + uint64(3)]) << uint64(24) | uint64(text[i + uint64(4)]) << uint64(32)
            | uint64(text[i + uint64(5)]) << uint64(40) | uint64(text[i + uint64(6)]) << uint64(48)
            | uint64(text[i + uint64(7)]) << uint64(56))


@compiled
def load(text, at, n):
    """The first n (1 to 8) bytes as a little-endian number."""
    return load8(text, at) & (~uint64(0) >> uint64(64 - 8 * n))


@compiled
def mix(low, high):
    """A hash of 16 bytes whose lowest bits depend on all of them."""
    mixed = (low ^ (high * uint64(0x9E3779B97F4A7C15))) * uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> uint64(32)
    return mixed * uint64(0xD6E8FEB86659FD93) >> uint64(20)


@compiled
def hash_bytes(text, at, n):
    hashed = uint64(n)
    while n > 8:
        hashed = mix(load8(text, at), hashed)
        at += 8
        n -= 8
    return mix(load(text, at, n), hashed)


@compiled
def same_bytes(a, at_a, b, at_b, n):
    while n > 8:
        if load8(a, at_a) != load8(b, at_b):
            return False
        at_a += 8
        at_b += 8
        n -= 8
    return load(a, at_a, n) == load(b, at_b, n)


# -- vectors and sets of bits -----------------------------------------------------------------------------------------

ONE = uint64(1)
ID_BITS = 21  # of an id: two ids and a third fit into 64 bits
BUCKET = 8    # rows of `Vocabulary.pairs` that are compared at once: a cache line
LANES = 16    # numbers of 32 bits of which the smallest is found at once


@intrinsic(prefer_literal=True)
def bytes_between(context, text, at, low, high):
    """A bit for each of the bytes text[at:at + WINDOW], the first one lowest: whether it lies in low..high, which are
    constants. A few instructions on processors with vectors of bytes."""
    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(8), WINDOW)
        low, high = (ir.Constant(vector, [argument.literal_value + shift] * WINDOW)
                     for argument, shift in ((signature.args[2], 0), (signature.args[3], -signature.args[2].literal_value)))
        address = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        found = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("<=", builder.sub(found, low), high), ir.IntType(WINDOW))
    return types.uint64(text, types.int64, low, high), generate


@intrinsic
def matching_id(context, rows, at, key):
    """Of the BUCKET numbers rows[at:at + BUCKET], the lowest ID_BITS of the one whose other bits are `key`; 0 if none is."""
    def generate(context, builder, signature, arguments):
        number = ir.IntType(64)
        vector = ir.VectorType(number, BUCKET)
        splat = lambda value: ir.Constant(vector, [value] * BUCKET)
        address = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        found = builder.load(builder.bitcast(address, vector.as_pointer()), align=8)
        keys = builder.insert_element(splat(0), arguments[2], ir.IntType(32)(0))
        keys = builder.shuffle_vector(keys, splat(0), ir.Constant(ir.VectorType(ir.IntType(32), BUCKET), [0] * BUCKET))
        is_key = builder.icmp_unsigned("==", builder.lshr(found, splat(ID_BITS)), keys)
        ids = builder.select(is_key, builder.and_(found, splat((1 << ID_BITS) - 1)), splat(0))
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.or.v{BUCKET}i64", (), ir.FunctionType(number, [vector]))
        return builder.call(reduce, [ids])
    return types.uint64(rows, types.uint64, types.uint64), generate


@intrinsic
def smallest(context, array, at):
    """The smallest of the LANES numbers from array[at] on, uint32."""
    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(32), LANES)
        address = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=4)
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.umin.v{LANES}i32", (), ir.FunctionType(ir.IntType(32), [vector]))
        return builder.call(reduce, [numbers])
    return types.uint32(array, types.uint64), generate


@intrinsic
def prefetch(context, rows, at):
    """Starts to load rows[at], of an array of two dimensions, into the cache of the processor."""
    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        number, address = ir.IntType(32), builder.ptrtoint(array.data, ir.IntType(64))
        stride = builder.extract_value(array.strides, 0)
        address = builder.inttoptr(builder.add(address, builder.mul(stride, arguments[1])), ir.IntType(8).as_pointer())
        call = builder.module.declare_intrinsic("llvm.prefetch", [address.type], ir.FunctionType(
            ir.VoidType(), [address.type, number, number, number]))
        builder.call(call, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()
    return types.void(rows, types.uint64), generate


@intrinsic
def lowest_bit(context, bits):
    """The index of the lowest bit that is set, 64 if none is."""
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))
    return types.int64(types.uint64), generate


@intrinsic
def leading_zeros(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))
    return types.int64(types.uint64), generate


@compiled
def highest_bit(bits):
    """The index of the highest bit that is set, -1 if none is."""
    return 63 - leading_zeros(bits)


@compiled
def lowest_bits(n):
    """The lowest n bits, 0 to 64."""
    return ~uint64(0) >> uint64(64 - n) if n else uint64(0)


# -- scanning: where words end ----------------------------------------------------------------------------------------

# Classes of characters; a table (0x110000,) uint8 maps every code point to its class.
OTHER, LETTER, NUMBER, BLANK, SPACE, NEWLINE, APOSTROPHE = range(7)  # BLANK is " ", NEWLINE \r or \n, SPACE the rest of \s
N_CLASSES = 8

# States of the scanner: what the current word consists of so far.
START, LETTERS, ONE_OTHER, OTHERS, LINE_END, ONE_BLANK, ONE_SPACE, DIGITS = range(8)  # DIGITS + i: i + 1 of at most 3
AT_APOSTROPHE, AT_SPACES = 10, 11  # the end of the word depends on more than the next character
N_STATES = 12
ENDS = 0x80  # set in a transition if the current word ends before this character

# How text is split. transitions (N_STATES * N_CLASSES,) uint8: the next state; classes: as above; max_digits: of GPT-4's
# pattern, how many digits a word has at most; 0 for GPT-2's, which has no such limit, no contractions in upper case, and
# treats line breaks as any whitespace.
Splitter = namedtuple("Splitter", "transitions classes max_digits")


def gpt4_splitter(classes: np.ndarray, max_digits: int) -> Splitter:
    r"""GPT-4's pattern with up to `max_digits` (1 to 3) digits in a word.

    '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}++ | \p{N}{1,max_digits}+ | ?[^\s\p{L}\p{N}]++[\r\n]*+ | whitespace
    """
    table = word_start_table({LETTER: LETTERS, NUMBER: DIGITS, BLANK: ONE_BLANK, SPACE: ONE_SPACE, NEWLINE: AT_SPACES,
                             APOSTROPHE: AT_APOSTROPHE, OTHER: ONE_OTHER})
    spaces = {BLANK: AT_SPACES, SPACE: AT_SPACES, NEWLINE: AT_SPACES}
    others = {OTHER: OTHERS, APOSTROPHE: OTHERS, NEWLINE: LINE_END}
    continue_word(table, LETTERS, {LETTER: LETTERS})
    continue_word(table, ONE_OTHER, others | {LETTER: LETTERS})
    continue_word(table, OTHERS, others)
    continue_word(table, LINE_END, {NEWLINE: LINE_END})
    continue_word(table, ONE_BLANK, spaces | {LETTER: LETTERS, OTHER: OTHERS, APOSTROPHE: OTHERS})
    continue_word(table, ONE_SPACE, spaces | {LETTER: LETTERS})
    for n in range(1, max_digits):
        continue_word(table, DIGITS + n - 1, {NUMBER: DIGITS + n})
    return Splitter(table.reshape(-1), classes, max_digits)


def gpt2_splitter(classes: np.ndarray) -> Splitter:
    r"""GPT-2's pattern: '(?:[sdmt]|ll|ve|re) | ?\p{L}++ | ?\p{N}++ | ?[^\s\p{L}\p{N}]++ | whitespace"""
    table = word_start_table({LETTER: LETTERS, NUMBER: DIGITS, BLANK: ONE_BLANK, SPACE: ONE_SPACE, NEWLINE: ONE_SPACE,
                             APOSTROPHE: AT_APOSTROPHE, OTHER: OTHERS})
    spaces = {BLANK: AT_SPACES, SPACE: AT_SPACES, NEWLINE: AT_SPACES}
    continue_word(table, LETTERS, {LETTER: LETTERS})
    continue_word(table, DIGITS, {NUMBER: DIGITS})
    continue_word(table, OTHERS, {OTHER: OTHERS, APOSTROPHE: OTHERS})
    continue_word(table, ONE_OTHER, {OTHER: OTHERS, APOSTROPHE: OTHERS})
    continue_word(table, ONE_BLANK, spaces | {LETTER: LETTERS, NUMBER: DIGITS, OTHER: OTHERS, APOSTROPHE: OTHERS})
    continue_word(table, ONE_SPACE, spaces)
    return Splitter(table.reshape(-1), classes, 0)


def word_start_table(states: dict[int, int]) -> np.ndarray:
    """Transitions in which every character ends the previous word. states: class of a word's first character -> state."""
    table = np.zeros((N_STATES, N_CLASSES), np.uint8)
    for kind, state in states.items():
        table[START, kind], table[START + 1:, kind] = state, state | ENDS
    return table


def continue_word(table: np.ndarray, state: int, next_states: dict[int, int]):
    """Adds transitions from `state` that do not end the word. next_states: class of the character -> state."""
    for kind, next_state in next_states.items():
        table[state, kind] = next_state


@compiled
def character(text, at, classes):
    """The class of the character at `at`, and where the next one starts. The text is valid UTF-8."""
    byte = int64(text[at])
    if byte < 0x80:
        return classes[byte], at + 1
    second = int64(text[at + 1]) & 0x3F
    if byte < 0xE0:
        return classes[(byte & 0x1F) << 6 | second], at + 2
    third = int64(text[at + 2]) & 0x3F
    if byte < 0xF0:
        return classes[(byte & 0x0F) << 12 | second << 6 | third], at + 3
    return classes[(byte & 0x07) << 18 | second << 12 | third << 6 | (int64(text[at + 3]) & 0x3F)], at + 4


@kernel
def scan(text, stop, splitter, ends):
    """Splits text[ends[0]:stop] into words: word i is text[ends[i]:ends[i + 1]]. Returns their number, less than len(ends);
    it stops when there is not room for WINDOW more.

    Looks at WINDOW bytes from the start of a word, as sets of bits, and finds all words that start there at once. The last
    of them may go on: the next window starts with it. `word_end` finds the end of a word that is longer, or that comes
    before whitespace or a number beyond ASCII, whose rules hold for characters and not for bytes.
    """
    _, classes, max_digits = splitter
    n, at, full = 0, ends[0], len(ends) - 1 - WINDOW
    while at < stop and n < full:
        edge = min(stop - at, WINDOW)
        letters = bytes_between(text, at, 0x41, 0x5A) | bytes_between(text, at, 0x61, 0x7A)
        numbers = bytes_between(text, at, 0x30, 0x39)
        spaces, blanks = bytes_between(text, at, 0x09, 0x0D), bytes_between(text, at, 0x20, 0x20)
        newlines = bytes_between(text, at, 0x0A, 0x0A) | bytes_between(text, at, 0x0D, 0x0D)
        apostrophes = bytes_between(text, at, 0x27, 0x27)
        leads = bytes_between(text, at, 0xC2, 0xF4) & lowest_bits(edge)  # first bytes of characters beyond ASCII
        while leads:
            i = lowest_bit(leads)
            leads &= leads - ONE
            kind, after = character(text, at + i, classes)
            if kind >= NUMBER:
                edge = i
                break
            if kind == LETTER:
                letters |= lowest_bits(after - at - i) << uint64(i)
        inside = lowest_bits(edge)
        letters, numbers, blanks, newlines = letters & inside, numbers & inside, blanks & inside, newlines & inside
        spaces = spaces & inside | blanks
        others = inside & ~(letters | numbers | spaces)
        if max_digits:
            inner = bytes_between(text, at, 0x80, 0xBF)  # bytes of a character but its first
            starts, gaps = gpt4_starts(letters, numbers, others, spaces, blanks, newlines, inner, max_digits)
        else:
            starts, gaps = gpt2_starts(letters, numbers, others, spaces, blanks), spaces
        starts = mark_contractions(text, at, stop, starts, starts & apostrophes & inside, max_digits > 0) & inside
        if at + edge < stop:  # where whitespace at the edge goes on, only its start is certain
            starts &= lowest_bits(min(highest_bit(inside & ~gaps) + 2, WINDOW))
        starts &= ~ONE
        while starts:
            n += 1
            ends[n] = at + lowest_bit(starts)
            starts &= starts - ONE
        if at + edge == stop:
            n += 1
            ends[n] = stop
        elif ends[n] == at:
            n += 1
            ends[n] = word_end(text, at, stop, splitter)
        at = ends[n]
    return n


# Sets of bits: in the arguments, the bytes of characters of these classes, where `others` are all that are no letters,
# numbers or spaces, and `spaces` are all whitespace; in the result, where words start. The first byte starts a word.
# x & x << 1 are the bytes of x that follow another one.


@compiled
def gpt2_starts(letters, numbers, others, spaces, blanks):
    continued = (letters & letters << ONE) | (numbers & numbers << ONE) | (others & others << ONE)
    words = letters | numbers | others
    return words & ~continued & ~(blanks << ONE) | space_starts(spaces, words)


@compiled
def space_starts(spaces, words):
    """Whitespace starts a word at its first character, and at its last one if a word follows."""
    return spaces & (~(spaces << ONE) | words >> ONE)


@compiled
def gpt4_starts(letters, numbers, others, spaces, blanks, newlines, inner, max_digits):
    """Also returns the whitespace without the line breaks that belong to `others` before them."""
    words = letters | numbers | others
    gaps = spaces & ~from_start(newlines, newlines & others << ONE)
    no_breaks = gaps & ~newlines
    other_starts = others & ~((others | blanks) << ONE)
    prefixes = no_breaks | other_starts  # characters that belong to letters after them
    for _ in range(3):
        prefixes |= prefixes << ONE & inner
    letter_starts = letters & ~((letters | prefixes) << ONE)
    number_starts = numbers & ~(numbers << ONE)
    full = numbers  # where this and the max_digits - 1 characters before are digits
    for _ in range(1, max_digits):
        full &= full << ONE
    more = number_starts << uint64(max_digits) & full
    while more:
        number_starts |= more
        more = more << uint64(max_digits) & full
    # whitespace splits after its last line break
    after_newline = no_breaks & (gaps & newlines) << ONE
    before_newline = (no_breaks + after_newline) & newlines  # the sum carries from the start of a run to what follows it
    while before_newline:
        i = lowest_bit(before_newline)
        after_newline ^= ONE << uint64(highest_bit(after_newline & lowest_bits(i)))
        before_newline &= before_newline - ONE
    gap_starts = gaps & ~(gaps << ONE) | no_breaks & words >> ONE | after_newline
    return letter_starts | number_starts | other_starts | gap_starts, gaps


@compiled
def from_start(runs, starts):
    """The runs of bits of which `starts` holds the first."""
    return runs & ~(runs + starts)


@compiled
def mark_contractions(text, at, stop, starts, apostrophes, any_case):
    """`starts` with the words that contractions make. apostrophes: those that start a word."""
    while apostrophes:
        i = lowest_bit(apostrophes)
        after = contraction_end(text, at + i, stop, any_case) - at
        if after > i:
            starts &= ~(ONE << uint64(i + 1))
            if after < WINDOW:
                starts |= ONE << uint64(after)
        apostrophes &= apostrophes - ONE
    return starts


@compiled
def word_end(text, start, stop, splitter):
    """The end of the word that starts at `start`: one step of a finite automaton per character."""
    transitions, classes, max_digits = splitter
    state, at = START, start
    while at < stop:
        kind, after = character(text, at, classes)
        state = transitions[state * N_CLASSES + kind]
        if state & ENDS:
            return at
        if state == AT_SPACES:
            return spaces_end(text, start, stop, classes, max_digits > 0)
        if state == AT_APOSTROPHE:
            end = contraction_end(text, start, stop, max_digits > 0)
            if end > start:
                return end
            state = ONE_OTHER
        at = after
    return stop


@compiled
def spaces_end(text, at, stop, classes, newline_splits):
    r"""`\s*[\r\n]|\s+(?!\S)|\s+`, without the first if not `newline_splits`.

    Whitespace ends after its last line break, else before its last character, which belongs to the next word.
    """
    end = last = at
    after_newline = -1
    while end < stop:
        kind, after = character(text, end, classes)
        if kind != BLANK and kind != SPACE and kind != NEWLINE:
            break
        if kind == NEWLINE:
            after_newline = after
        last, end = end, after
    if newline_splits and after_newline >= 0:
        return after_newline
    return end if end == stop or last == at else last


S, D, M, T, L, V, R, E = b"sdmtlvre"


@compiled
def contraction_end(text, at, stop, any_case):
    """The end of 's, 'd, 'm, 't, 'll, 've or 're at the apostrophe `at`, else `at`."""
    case = uint8(0x20) if any_case else uint8(0)
    first, second = text[at + 1] | case, text[at + 2] | case
    if at + 2 <= stop and first in (S, D, M, T):
        return at + 2
    if at + 3 <= stop:
        if (first == L and second == L) or (second == E and first in (V, R)):
            return at + 3
        if any_case and text[at + 1] == 0xC5 and text[at + 2] == 0xBF:  # U+017F, a long s, is an s in another case
            return at + 3
    return at


# -- counting words ---------------------------------------------------------------------------------------------------

SHORT = 15  # bytes of a word that fit into its key
LONG = uint64(0xFF << 56)

# A hash table of words. slots (n, 3) uint64: a key of two numbers, and how often the word occurs, 0 where the slot is free.
# A short word is its own key: its bytes and, in the topmost byte, its length. The key of a longer one is its hash and
# LONG + its index among the long words, whose bytes lie end to end. long_ends (n + 1,) int64 into long_bytes. used: words,
# long words.
Words = namedtuple("Words", "slots long_bytes long_ends used")


def empty_words() -> Words:
    """An empty table to count into."""
    return Words(np.zeros((1 << 12, 3), np.uint64), np.zeros(1 << 12, np.uint8), np.zeros(1 << 8, np.int64),
                 np.zeros(2, np.int64))


@compiled
def short_key(text, at, n):
    """The key of a word of up to SHORT bytes: its bytes and its length. Without a branch on the length."""
    n_low = uint64(min(n, 8))
    n_high = uint64(n) - n_low
    low = load8(text, at) & ~uint64(0) >> uint64(64) - (n_low << uint64(3))
    high = load8(text, at + 8) & (ONE << (n_high << uint64(3))) - ONE
    return low, high | uint64(n) << uint64(56)


@compiled
def word_slot(slots, low, high):
    """The row of the word with this key, or the free row where it belongs."""
    mask = len(slots) - 1
    slot = int64(mix(low, high)) & mask
    while slots[slot, 1] and (slots[slot, 0] != low or slots[slot, 1] != high):
        slot = (slot + 1) & mask
    return slot


@compiled
def grow(array, n):
    """`array`, or a copy of 2 n entries if it has fewer than n."""
    if n <= len(array):
        return array
    larger = np.zeros(2 * n, array.dtype)
    for i in range(len(array)):
        larger[i] = array[i]
    return larger


@compiled
def grow_slots(slots):
    """The same words in a table of twice the size."""
    larger = np.zeros((2 * len(slots), 3), np.uint64)
    mask = len(larger) - 1
    for i in range(len(slots)):
        if slots[i, 2]:
            low, high = slots[i, 0], slots[i, 1]
            at = int64(mix(low, uint64(0) if high >= LONG else high)) & mask
            while larger[at, 2]:
                at = (at + 1) & mask
            larger[at, 0], larger[at, 1], larger[at, 2] = low, high, slots[i, 2]
    return larger


@compiled
def add_long_word(words, text, at, n):
    """Counts a word longer than SHORT. Returns the words, whose arrays may have been replaced by larger ones."""
    slots, long_bytes, long_ends, used = words
    hashed = hash_bytes(text, at, n)
    mask = len(slots) - 1
    slot = int64(mix(hashed, uint64(0))) & mask
    while slots[slot, 2]:
        if slots[slot, 0] == hashed and slots[slot, 1] >= LONG:
            index = int64(slots[slot, 1] - LONG)
            start = long_ends[index]
            if long_ends[index + 1] - start == n and same_bytes(long_bytes, start, text, at, n):
                slots[slot, 2] += uint64(1)
                return words
        slot = (slot + 1) & mask
    index = used[1]
    start = long_ends[index]
    long_bytes, long_ends = grow(long_bytes, start + n + PADDING), grow(long_ends, index + 2)
    for i in range(n):
        long_bytes[start + i] = text[at + i]
    long_ends[index + 1] = start + n
    slots[slot, 0], slots[slot, 1], slots[slot, 2] = hashed, LONG + uint64(index), uint64(1)
    used += 1
    return Words(slots, long_bytes, long_ends, used)


@kernel
def add_words(words, text, ends):
    """Counts the words text[ends[i]:ends[i + 1]]. Returns the words, whose arrays may have been replaced by larger ones."""
    while 2 * (words.used[0] + len(ends)) > len(words.slots):
        words = Words(grow_slots(words.slots), words.long_bytes, words.long_ends, words.used)
    slots, keys = words.slots, np.empty((len(ends), 2), np.uint64)
    for i in range(len(ends) - 1):
        low, high = short_key(text, ends[i], min(ends[i + 1] - ends[i], SHORT))
        keys[i, 0], keys[i, 1] = low, high
        prefetch(slots, mix(low, high) & uint64(len(slots) - 1))
    for i in range(len(ends) - 1):
        at = ends[i]
        n = ends[i + 1] - at
        if n > SHORT:
            words = add_long_word(words, text, at, n)
            continue
        low, high = keys[i, 0], keys[i, 1]
        slot = word_slot(slots, low, high)
        if not slots[slot, 2]:
            slots[slot, 0], slots[slot, 1] = low, high
            words.used[0] += 1
        slots[slot, 2] += uint64(1)
    return words


@kernel
def add_documents(words, text, offsets, splitter):
    """Counts the words of the documents text[offsets[i]:offsets[i + 1]]. Returns the words, as `add_words`."""
    ends = np.empty(BLOCK + 1, np.int64)
    for i in range(len(offsets) - 1):
        n, ends[0] = 0, offsets[i]
        while ends[n] < offsets[i + 1]:
            ends[0] = ends[n]
            n = scan(text, offsets[i + 1], splitter, ends)
            words = add_words(words, text, ends[:n + 1])
    return words


# -- a heap -----------------------------------------------------------------------------------------------------------

# A binary heap of pairs of numbers: heap (capacity, 2) uint64, of which the first `size` rows are in use. Row 0 is the
# smallest; the second number breaks ties.


@compiled
def heap_push(heap, size, first, second):
    at = size
    while at > 0:
        above = (at - 1) >> 1
        if heap[above, 0] < first or (heap[above, 0] == first and heap[above, 1] <= second):
            break
        heap[at, 0], heap[at, 1] = heap[above, 0], heap[above, 1]
        at = above
    heap[at, 0], heap[at, 1] = first, second


@compiled
def heap_pop(heap, size):
    """Removes row 0. size: before the removal."""
    first, second = heap[size - 1, 0], heap[size - 1, 1]
    at = 0
    while 2 * at + 1 < size - 1:
        below = 2 * at + 1
        if below + 1 < size - 1 and (heap[below + 1, 0] < heap[below, 0] or (
                heap[below + 1, 0] == heap[below, 0] and heap[below + 1, 1] < heap[below, 1])):
            below += 1
        if first < heap[below, 0] or (first == heap[below, 0] and second <= heap[below, 1]):
            break
        heap[at, 0], heap[at, 1] = heap[below, 0], heap[below, 1]
        at = below
    heap[at, 0], heap[at, 1] = first, second


# -- learning merges --------------------------------------------------------------------------------------------------

# The distinct words, as parts that merge. parts (n, 2) int32 holds, at the first and at the last byte of a part, its id,
# so that the next part starts at i + lengths[id] and the previous one ends at i - 1: no linked list is needed. Where a
# part started that is now the right half of another, it holds INSIDE or the id of that other: positions in `Pairs` may be
# stale, but an id never occurs where its part no longer starts. NOTHING separates words. The second column is the word's
# index in `counts`.
Corpus = namedtuple("Corpus", "parts counts lengths")
NOTHING, INSIDE = -1, -2

# Pairs of adjacent parts. slots (power of 2, 2) uint64: left << 32 | right, and 1 + its row in `rows`. rows (n, 3) int64:
# the pair's count, and where its positions lie in `positions`: start and number. A pair can only arise together with the
# later of its two tokens, so its positions are written once, and skipped where they are stale. heap: of
# (-count, left << 32 | right); its counts may be too high, as counts only ever fall. used: rows, positions, heap.
Pairs = namedtuple("Pairs", "slots rows positions heap used")

# The neighbours on one side of a merge, an array (vocabulary + 1, 3) int64. Columns COUNT, POSITIONS: how often, and at how
# many positions, the token of this row is a neighbour. Column TOKEN: a list of these tokens, its length in the last row.
COUNT, POSITIONS, TOKEN = range(3)


def learn(words: Words, n_merges: int, per_call: int = 256):
    """Yields arrays (up to per_call, 2) of pairs of ids; the i-th of all becomes id 256 + i. Ends when no pair is left.

    The most frequent pair is next; among equals the one with the smallest left id, then right id.
    """
    slots = words.slots[words.slots[:, 1] > 0]
    words = words._replace(slots=slots[np.argsort(slots[:, 0].byteswap())])  # similar words share cache lines
    n_words, n_parts = corpus_size(words)
    corpus = Corpus(np.zeros((n_parts, 2), np.int32), np.zeros(n_words, np.int64), np.ones(256 + n_merges, np.int64))
    spell_words(words, corpus)
    del words, slots
    # every merge removes one part and adds at most two positions
    positions = np.empty(3 * n_parts, np.int32 if n_parts < MANY_PARTS else np.int64)
    pairs = Pairs(np.zeros((PAIR_SLOTS, 2), np.uint64), np.zeros((PAIR_SLOTS * 3 // 5, 3), np.int64), positions,
                  np.zeros((PAIR_SLOTS * 3 // 5, 2), np.uint64), np.zeros(3, np.int64))
    find_byte_pairs(corpus, pairs)
    before, after = np.zeros((2, 256 + n_merges + 1, 3), np.int64)
    merges, n = np.zeros((n_merges, 2), np.int64), 0
    while n < n_merges and pairs.used[2]:
        known = n
        n = merge_until(corpus, pairs, before, after, merges, known, min(known + per_call, n_merges))
        yield merges[known:n]
        if pairs.used[2] and n < min(known + per_call, n_merges):
            pairs = grow_pairs(pairs)


PAIR_SLOTS = 1 << 17  # initially; all pairs of bytes fit
MANY_PARTS = 1 << 31  # so many need positions of 64 bits


def grow_pairs(pairs: Pairs) -> Pairs:
    """The same pairs with twice the capacity."""
    slots = np.zeros((2 * len(pairs.slots), 2), np.uint64)
    rehash_pairs(pairs.slots, slots)
    for array in (pairs.rows, pairs.heap):
        array.resize((2 * len(array), array.shape[1]), refcheck=False)  # in place, as memory is scarcest here
    return pairs._replace(slots=slots)


@kernel
def corpus_size(words):
    """The number of words of more than one byte, and of parts: their bytes, with a NOTHING before and after each word."""
    n, size = 0, 1
    for i in range(len(words.slots)):
        length = word_length(words, i)
        if length > 1:
            n += 1
            size += length + 1
    return n, size


@compiled
def word_length(words, slot):
    high = words.slots[slot, 1]
    if high < LONG:
        return int64(high >> uint64(56))
    index = int64(high - LONG)
    return words.long_ends[index + 1] - words.long_ends[index]


@kernel
def spell_words(words, corpus):
    """Writes the bytes of the words into `corpus`."""
    at, word = 0, 0
    corpus.parts[0, 0] = NOTHING
    for i in range(len(words.slots)):
        length = word_length(words, i)
        if length == 1:
            continue
        for j in range(length):
            if length <= SHORT:
                byte = int64(words.slots[i, j >> 3] >> uint64(8 * (j & 7)) & uint64(0xFF))
            else:
                byte = int64(words.long_bytes[words.long_ends[int64(words.slots[i, 1] - LONG)] + j])
            corpus.parts[at + 1 + j, 0], corpus.parts[at + 1 + j, 1] = byte, word
        corpus.counts[word] = int64(words.slots[i, 2])
        word += 1
        at += length + 1
        corpus.parts[at, 0] = NOTHING


@compiled
def pack_pair(left, right):
    return uint64(left) << uint64(32) | uint64(right)


@compiled
def pair_slot(slots, pair):
    """The row of `pair`, or the free row where it belongs."""
    mask = len(slots) - 1
    slot = int64(mix(pair, uint64(0))) & mask
    while slots[slot, 1] and slots[slot, 0] != pair:
        slot = (slot + 1) & mask
    return slot


@kernel
def rehash_pairs(slots, larger):
    for i in range(len(slots)):
        if slots[i, 1]:
            slot = pair_slot(larger, slots[i, 0])
            larger[slot, 0], larger[slot, 1] = slots[i, 0], slots[i, 1]


@compiled
def push_pair(heap, used, pair, count):
    heap_push(heap, used[2], uint64(-count), pair)
    used[2] += 1


@compiled
def add_pair(slots, rows, heap, used, pair, count, n):
    """Adds a pair that occurs at n positions. Returns where in `positions` the caller has to write them."""
    row, start = used[0], used[1]
    slot = pair_slot(slots, pair)
    slots[slot, 0], slots[slot, 1] = pair, uint64(row + 1)
    rows[row, 0], rows[row, 1], rows[row, 2] = count, start, n
    used[0] += 1
    used[1] += n
    push_pair(heap, used, pair, count)
    return start


@kernel
def find_byte_pairs(corpus, pairs):
    """Fills `pairs` with all pairs of bytes: counts them in a first pass, writes their positions in a second."""
    parts, word_counts, _ = corpus
    slots, rows, positions, heap, used = pairs
    counts, n = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    for i in range(1, len(parts) - 1):
        if parts[i, 0] >= 0 and parts[i + 1, 0] >= 0:
            pair = parts[i, 0] << 8 | parts[i + 1, 0]
            counts[pair] += word_counts[parts[i, 1]]
            n[pair] += 1
    for pair in range(1 << 16):
        if n[pair]:
            n[pair] = add_pair(slots, rows, heap, used, pack_pair(pair >> 8, pair & 0xFF), counts[pair], n[pair])
    for i in range(1, len(parts) - 1):
        if parts[i, 0] >= 0 and parts[i + 1, 0] >= 0:
            pair = parts[i, 0] << 8 | parts[i + 1, 0]
            positions[n[pair]] = i
            n[pair] += 1


@kernel
def merge_until(corpus, pairs, before, after, merges, done, stop):
    """Continues from `done` merges to `stop`. Returns how many are done; fewer when no pair is left, or when `pairs` lacks
    the capacity for what the next merge may add."""
    slots, rows, positions, heap, used = pairs
    while done < stop:
        row, pair = pop_most_frequent(slots, rows, heap, used)
        if row < 0:
            break
        new = 256 + done
        start, n = rows[row, 1], rows[row, 2]
        if max(used[0], used[2]) + 2 * min(n, new + 1) + 1 > len(rows):
            push_pair(heap, used, pair, rows[row, 0])
            break
        left, right = int64(pair >> uint64(32)), int64(pair & uint64(0xFFFFFFFF))
        merges[done, 0], merges[done, 1] = left, right
        corpus.lengths[new] = corpus.lengths[left] + corpus.lengths[right]
        n = merge_pair(corpus, positions[start:start + n], left, right, new, before, after)
        for i in range(before[-1, TOKEN]):
            decrease_count(slots, rows, pack_pair(before[i, TOKEN], left), before[before[i, TOKEN], COUNT])
        for i in range(after[-1, TOKEN]):
            decrease_count(slots, rows, pack_pair(right, after[i, TOKEN]), after[after[i, TOKEN], COUNT])
        rows[row, 0] = 0
        clear_neighbours(before)
        clear_neighbours(after)
        add_pairs_with(corpus, pairs, start, n, new, before, after)
        clear_neighbours(before)
        clear_neighbours(after)
        done += 1
    return done


@compiled
def pop_most_frequent(slots, rows, heap, used):
    """The row of the most frequent pair, and the pair; row -1 when none is left."""
    while used[2]:
        count, pair = -int64(heap[0, 0]), heap[0, 1]
        heap_pop(heap, used[2])
        used[2] -= 1
        row = int64(slots[pair_slot(slots, pair), 1]) - 1
        current = rows[row, 0]
        if count == current:
            return row, pair
        if current:
            push_pair(heap, used, pair, current)
    return -1, uint64(0)


@compiled
def merge_pair(corpus, positions, left, right, new, before, after):
    """Replaces the pair by `new` at those of its positions that are not stale; moves these to the front and returns their
    number.

    Positions ascend, so that of "aaa" the first two merge. Records the neighbours that the pair had.
    """
    parts, counts, lengths = corpus
    merged = 0
    for i in range(len(positions)):
        at = int64(positions[i])
        middle, last = at + lengths[left], at + lengths[new] - 1
        if parts[at, 0] != left or parts[middle, 0] != right:
            continue
        record_neighbours(parts, counts, at, last + 1, new, before, after)
        parts[middle, 0] = INSIDE
        parts[at, 0] = parts[last, 0] = new
        positions[merged] = at
        merged += 1
    return merged


@compiled
def record_neighbours(parts, counts, at, end, token, before, after):
    """Records the parts on both sides of the `token` that is, or is about to be, from `at` to `end`."""
    left, right = int64(parts[at - 1, 0]), int64(parts[end, 0])
    count = counts[parts[at, 1]]
    if left >= 0 and left != token:  # of two equal tokens, the left one records the right one
        record_neighbour(before, left, count)
    if right >= 0:
        record_neighbour(after, right, count)


@compiled
def record_neighbour(neighbours, token, count):
    if neighbours[token, POSITIONS] == 0:
        neighbours[neighbours[-1, TOKEN], TOKEN] = token
        neighbours[-1, TOKEN] += 1
    neighbours[token, COUNT] += count
    neighbours[token, POSITIONS] += 1


@compiled
def clear_neighbours(neighbours):
    for i in range(neighbours[-1, TOKEN]):
        neighbours[neighbours[i, TOKEN], COUNT] = neighbours[neighbours[i, TOKEN], POSITIONS] = 0
    neighbours[-1, TOKEN] = 0


@compiled
def decrease_count(slots, rows, pair, count):
    rows[int64(slots[pair_slot(slots, pair), 1]) - 1, 0] -= count


@compiled
def add_pairs_with(corpus, pairs, start, n, new, before, after):
    """Adds the pairs that contain `new`, and their positions, which ascend as those of `new` do."""
    parts, counts, lengths = corpus
    slots, rows, positions, heap, used = pairs
    for i in range(start, start + n):
        at = int64(positions[i])
        record_neighbours(parts, counts, at, at + lengths[new], new, before, after)
    for i in range(before[-1, TOKEN]):
        token = before[i, TOKEN]
        count, n_positions = before[token, COUNT], before[token, POSITIONS]
        before[token, POSITIONS] = add_pair(slots, rows, heap, used, pack_pair(token, new), count, n_positions)
    for i in range(after[-1, TOKEN]):
        token = after[i, TOKEN]
        count, n_positions = after[token, COUNT], after[token, POSITIONS]
        after[token, POSITIONS] = add_pair(slots, rows, heap, used, pack_pair(new, token), count, n_positions)
    # from here on POSITIONS is where in `positions` the next one is written
    for i in range(start, start + n):
        at = int64(positions[i])
        left, right = int64(parts[at - 1, 0]), int64(parts[at + lengths[new], 0])
        if left >= 0 and left != new:
            positions[before[left, POSITIONS]] = at - lengths[left]
            before[left, POSITIONS] += 1
        if right >= 0:
            positions[after[right, POSITIONS]] = at
            after[right, POSITIONS] += 1


# -- encoding ---------------------------------------------------------------------------------------------------------

NONE = (1 << ID_BITS) - 1  # no id; above all ids

# A vocabulary. byte_ids (256,) uint32: the id of a byte, or NONE; byte_pairs (65536,) uint32: the id of two bytes, or NONE;
# token_bytes uint8: the bytes of all tokens end to end, token i from starts[i] to starts[i + 1]; tokens (power of 2,)
# uint32: a hash table by the bytes of id + 1, 0 where free; pairs (power of 2,) uint64: buckets of BUCKET rows, each of
# left, right and 1 + the id of the merged token, of ID_BITS. known (power of 2, 4) uint64: a row, as in a cache, for each
# short word that is a single token.
Vocabulary = namedtuple("Vocabulary", "byte_ids byte_pairs token_bytes starts tokens pairs known")

# What a thread needs to encode. rows (power of 2, 4) uint64, a hash table of words and their ids: the key of a short word,
# then its ids, 32 bits each, of which the topmost byte says how many there are; more than CACHED_IDS lie in `spilled`,
# uint32, from the index on that the row holds instead. room (2,) int64: how many more words fit, and how much of `spilled`
# is in use. scratch: for the words of a block.
Cache = namedtuple("Cache", "rows spilled room scratch")
CACHED_IDS = 4
CACHED_WORDS = 1 << 16  # besides the single tokens; 5 MB of English text have 50,000

# The words of a block. found (BLOCK,) int64: the row of a word; or MERGED, LONG_WORD, FIRST_TOKEN - id. keys (BLOCK, 2)
# uint64. The rest are arguments of `merge_words`.
Scratch = namedtuple("Scratch", "found keys merging unfinished parts ranks nexts befores")
MERGED, LONG_WORD, FIRST_TOKEN = -1, -2, -3
MERGED_BYTES = 512     # longest word that is merged without a heap
MERGED_PARTS = 1 << 16  # of all words that are merged together


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def zero_lines(n: int) -> np.ndarray:
    """n zeros, (n,) uint64, that start with a cache line."""
    zeros = np.zeros(n + 8, np.uint64)
    first = -zeros.ctypes.data // 8 % 8
    return zeros[first:first + n]


def make_vocabulary(tokens: list[bytes]) -> Vocabulary:
    """tokens: bytes by id; b"" for an id that text never encodes to. A byte that is no token must not occur in text."""
    starts = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(token) for token in tokens], out=starts[1:])
    n_tokens = sum(map(bool, tokens))
    vocabulary = Vocabulary(
        np.full(256, NONE, np.uint32), np.full(1 << 16, NONE, np.uint32), pad_text(tokens), starts,
        np.zeros(power_of_two(2 * n_tokens), np.uint32), zero_lines(BUCKET),
        zero_lines(4 * power_of_two((n_tokens + CACHED_WORDS) * 4 // 3)).reshape(-1, 4))
    add_tokens(vocabulary)
    n_pairs, room = n_tokens, 0  # a token is the merger of one pair; of several if training would not produce it
    while n_pairs > room:
        room = n_pairs
        vocabulary = vocabulary._replace(pairs=zero_lines(power_of_two(max(BUCKET, room * 3 // 2))))
        n_pairs = add_pairs(vocabulary, make_scratch(2 * MERGED_BYTES), room)
    return vocabulary


def make_cache(vocabulary: Vocabulary) -> Cache:
    rows = zero_lines(vocabulary.known.size).reshape(-1, 4)
    cache = Cache(rows, np.zeros(CACHED_WORDS * CACHED_IDS, np.uint32), np.zeros(2, np.int64), make_scratch(MERGED_PARTS))
    reset_cache(cache, vocabulary)
    return cache


def make_scratch(n_parts: int) -> Scratch:
    return Scratch(np.empty(BLOCK, np.int64), np.empty((BLOCK, 2), np.uint64), np.empty((BLOCK, 4), np.int64),
                   np.empty(BLOCK, np.int64), *np.empty((4, n_parts), np.uint32))


def reset_cache(cache: Cache, vocabulary: Vocabulary):
    """Removes all words but the single tokens."""
    cache.rows[:], cache.room[:] = vocabulary.known, (CACHED_WORDS, 0)


@compiled
def find_token(tokens, starts, token_bytes, text, at, n):
    """The id of the token text[at:at + n], or NONE."""
    mask = len(tokens) - 1
    slot = int64(hash_bytes(text, at, n)) & mask
    while tokens[slot]:
        token = int64(tokens[slot]) - 1
        start = starts[token]
        if starts[token + 1] - start == n and same_bytes(token_bytes, start, text, at, n):
            return token
        slot = (slot + 1) & mask
    return NONE


@kernel
def add_tokens(vocabulary):
    """Fills all but `pairs` from the bytes of the tokens."""
    byte_ids, byte_pairs, token_bytes, starts, tokens, _, known = vocabulary
    mask = len(tokens) - 1
    for token in range(len(starts) - 1):
        start, n = starts[token], starts[token + 1] - starts[token]
        if n == 0:
            continue
        slot = int64(hash_bytes(token_bytes, start, n)) & mask
        while tokens[slot]:
            slot = (slot + 1) & mask
        tokens[slot] = token + 1
        first = int64(token_bytes[start])
        if n == 1:
            byte_ids[first] = token
        elif n == 2:
            byte_pairs[first << 8 | int64(token_bytes[start + 1])] = token
        if n <= SHORT:
            low, high = short_key(token_bytes, start, n)
            row = cached_row(known, low, high, home_row(known, low, high))
            known[row, 0], known[row, 1], known[row, 2], known[row, 3] = low, high, uint64(token), ONE << uint64(56)


@kernel
def add_pairs(vocabulary, scratch, room):
    """Fills `pairs` with up to `room` pairs of tokens that merge into a third; returns how many there are.

    As in tiktoken, any two parts merge whose bytes together are a token. But what happens between the ends of a part does
    not depend on what lies around it: two parts merge into a token only if they are the last two when it is encoded by
    itself. Where tokens of lower ids, which merge first, do not lead to two parts, all ways to cut it in two are added.
    """
    byte_ids, byte_pairs, token_bytes, starts, tokens, pairs, _ = vocabulary
    longest = 0
    for token in range(len(starts) - 1):
        longest = max(longest, starts[token + 1] - starts[token])
    occurs = np.zeros(longest + 1, np.uint8)  # lengths of tokens, so as not to search one of a million bytes
    for token in range(len(starts) - 1):
        occurs[starts[token + 1] - starts[token]] = 1
    merging, parts = scratch.merging, scratch.parts
    n = 0
    for token in range(len(starts) - 1):
        start, stop = starts[token], starts[token + 1]
        if stop - start <= 2:
            continue  # `byte_pairs` has them
        if stop - start <= MERGED_BYTES:
            merging[0, 0], merging[0, 1], merging[0, 2] = start, stop - start, 0
            merge_words(token_bytes, 1, byte_ids, byte_pairs, pairs, scratch)
            if merging[0, 3] == 2 and parts[0] != NONE and parts[1] != NONE:
                n += 1
                if n <= room:
                    add_pair_of_tokens(pairs, parts[0], parts[1], token)
                continue
        for middle in range(start + 1, stop):
            if not (occurs[middle - start] and occurs[stop - middle]):
                continue
            left = find_token(tokens, starts, token_bytes, token_bytes, start, middle - start)
            if left == NONE:
                continue
            right = find_token(tokens, starts, token_bytes, token_bytes, middle, stop - middle)
            if right != NONE:
                n += 1
                if n <= room:
                    add_pair_of_tokens(pairs, left, right, token)
    return n


@compiled
def bucket_of(pairs, left, right):
    """The key of a pair, and the first row of its bucket."""
    key = uint64(left) << uint64(ID_BITS) | uint64(right)
    return key, key * uint64(0x9E3779B97F4A7C15) >> uint64(32) & uint64(len(pairs) - BUCKET)


@compiled
def add_pair_of_tokens(pairs, left, right, token):
    key, row = bucket_of(pairs, left, right)
    while pairs[row]:
        row = row + ONE & uint64(len(pairs) - 1)
    pairs[row] = key << uint64(ID_BITS) | uint64(token + 1)


@compiled
def find_pair(pairs, left, right):
    """The id of the merged pair, or NONE; uint64."""
    key, row = bucket_of(pairs, left, right)
    found = matching_id(pairs, row, key)
    while (found == 0) & (pairs[row + uint64(BUCKET - 1)] != 0):  # a full bucket goes on in the next one
        row = row + uint64(BUCKET) & uint64(len(pairs) - 1)
        found = matching_id(pairs, row, key)
    return found - ONE & uint64(NONE)


@compiled
def merged_width(n):
    """How many entries of the arrays a word of n bytes takes that is merged: one more, and a multiple of LANES."""
    return n + LANES & -LANES


@compiled
def merge_words(text, n_words, byte_ids, byte_pairs, pairs, scratch):
    """Merges words: in each the adjacent pair of lowest rank, the leftmost of equals, until none is left.

    scratch.merging[i]: where in `text` word i starts, its length, where its entries in the other arrays start, and here, at
    the end, how many ids it has. The ids are written to `parts`.

    In a round, each unfinished word merges one pair: the words do not depend on each other, so the processor works on
    several at once. A part stands at the index of its first byte; next, before: where its neighbours stand; ranks: the rank
    of its merger with the next one, and below it the index in the word, so that the smallest tells both. The last entry of a
    word is the neighbour of its first and of its last part.
    """
    _, _, merging, unfinished, parts, ranks, nexts, befores = scratch
    for i in range(n_words):
        at, n, first = merging[i, 0], merging[i, 1], uint64(merging[i, 2])
        width = merged_width(n)
        for j in range(width):
            ranks[first + uint64(j)] = NO_RANK
        for j in range(n):
            part, byte = first + uint64(j), uint64(at + j)
            pair = uint64(text[byte]) << uint64(8) | uint64(text[byte + ONE])
            parts[part], ranks[part] = byte_ids[text[byte]], byte_pairs[pair] << uint32(INDEX_BITS) | uint32(j)
            nexts[part], befores[part] = part + ONE, part - ONE
        last, end = first + uint64(n - 1), first + uint64(width - 1)
        nexts[last] = befores[first] = end
        parts[end], ranks[last] = NONE, NO_RANK
        unfinished[i] = i
    n_unfinished = n_words
    while n_unfinished:
        n = 0
        for k in range(n_unfinished):
            i = unfinished[k]
            first = uint64(merging[i, 2])
            # here, not after the merge: the processor waits when it loads a vector of which a number has just been stored
            lowest = uint64(smallest_rank(ranks, first, merged_width(merging[i, 1])))
            if lowest >= NO_RANK:
                continue
            unfinished[n] = i
            n += 1
            token, left = lowest >> uint64(INDEX_BITS), first + (lowest & uint64((1 << INDEX_BITS) - 1))
            right = nexts[left]
            after, before = uint64(nexts[right]), uint64(befores[left])
            parts[left], nexts[left], befores[after], ranks[right] = token, after, left, NO_RANK
            ranks[left] = find_pair(pairs, token, parts[after]) << uint64(INDEX_BITS) | left - first
            ranks[before] = find_pair(pairs, parts[before], token) << uint64(INDEX_BITS) | before - first
        n_unfinished = n
    for i in range(n_words):
        first = uint64(merging[i, 2])
        n, part, end = uint64(0), first, first + uint64(merged_width(merging[i, 1]) - 1)
        while part != end:
            parts[first + n] = parts[part]
            n += ONE
            part = uint64(nexts[part])
        merging[i, 3] = n


INDEX_BITS = 32 - ID_BITS
NO_RANK = uint64(NONE << INDEX_BITS)


@compiled
def smallest_rank(ranks, first, width):
    lowest = smallest(ranks, first)
    for i in range(LANES, width, LANES):
        lowest = min(lowest, smallest(ranks, first + uint64(i)))
    return lowest


@compiled
def merge_long_word(text, at, n, byte_ids, byte_pairs, pairs, starts, parts, ranks):
    """Writes the ids of the word text[at:at + n] into `parts`; returns their number. Both arrays have room for n.

    In O(n log n) with a heap: a "word" may have 300,000 letters. As in `Corpus`, a part's id is stored at its first and its
    last byte. Takes 64 bytes of memory per byte of the word.
    """
    heap, size = np.empty((3 * n, 2), np.uint64), 0
    for i in range(n):
        parts[i] = byte_ids[text[at + i]]
        ranks[i] = byte_pairs[int64(text[at + i]) << 8 | int64(text[at + i + 1])] if i + 1 < n else NONE
        if ranks[i] != NONE:
            heap_push(heap, size, uint64(ranks[i]), uint64(i))
            size += 1
    while size:
        rank, left = int64(heap[0, 0]), int64(heap[0, 1])
        heap_pop(heap, size)
        size -= 1
        if ranks[left] != rank:
            continue  # stale: one of the two has been merged since
        right = left + starts[parts[left] + 1] - starts[parts[left]]
        end = right + starts[parts[right] + 1] - starts[parts[right]]
        before = left - (starts[parts[left - 1] + 1] - starts[parts[left - 1]]) if left else -1
        parts[left] = parts[end - 1] = rank
        ranks[right] = NONE
        ranks[left] = int64(find_pair(pairs, parts[left], parts[end])) if end < n else NONE
        if ranks[left] != NONE:
            heap_push(heap, size, uint64(ranks[left]), uint64(left))
            size += 1
        if before >= 0:
            ranks[before] = find_pair(pairs, parts[before], parts[left])
            if ranks[before] != NONE:
                heap_push(heap, size, uint64(ranks[before]), uint64(before))
                size += 1
    m, i = 0, 0
    while i < n:
        token = parts[i]
        parts[m] = token
        m += 1
        i += starts[token + 1] - starts[token]
    return m


@compiled
def home_row(rows, low, high):
    """Where the search for a word's row starts: the first of two that share a cache line."""
    hashed = (low ^ high * uint64(0x9E3779B97F4A7C15)) * uint64(0xD6E8FEB86659FD93)
    return hashed >> uint64(32) & uint64(len(rows) - 2)


@compiled
def is_row(rows, row, low, high):
    return (rows[row, 0] == low) & (rows[row, 1] == high)


@compiled
def cached_row(rows, low, high, home):
    """The row of the word with this key, or the free row where it belongs."""
    row = home
    while rows[row, 1] and (rows[row, 0] != low or rows[row, 1] != high):
        row = row + ONE & uint64(len(rows) - 1)
    return row


@kernel
def encode_words(text, ends, n_words, vocabulary, cache, ids, n):
    """Writes the ids of the words text[ends[i]:ends[i + 1]] from ids[n] on; returns the index after them."""
    for first in range(0, n_words, BLOCK):
        n = encode_block(text, ends[first:], min(BLOCK, n_words - first), vocabulary, cache, ids, n)
    return n


@compiled
def encode_block(text, ends, n_words, vocabulary, cache, ids, n):
    """As `encode_words`, for up to BLOCK words.

    In passes, so that the processor can run ahead of the accesses to memory: where each word may lie in the cache; whether
    it is there; the merges of all that are not; the ids.
    """
    byte_ids, byte_pairs, token_bytes, starts, tokens, pairs, _ = vocabulary
    rows, spilled, room, scratch = cache
    found, keys, merging, _, parts, _, _, _ = scratch
    for i in range(n_words):
        low, high = short_key(text, ends[i], min(ends[i + 1] - ends[i], SHORT))
        home = home_row(rows, low, high)
        keys[i, 0], keys[i, 1], found[i] = low, high, home
        prefetch(rows, home)
    n_merged = n_parts = 0
    for i in range(n_words):
        at, length = ends[i], ends[i + 1] - ends[i]
        if length <= SHORT:
            low, high, row = keys[i, 0], keys[i, 1], uint64(found[i])
            is_first, is_second = is_row(rows, row, low, high), is_row(rows, row + ONE, low, high)
            if is_first | is_second:  # one branch, which is nearly always taken
                found[i] += is_second
                continue
            row = cached_row(rows, low, high, row)
            if rows[row, 1]:
                found[i] = row
                continue
        else:
            token = find_token(tokens, starts, token_bytes, text, at, length)
            if token != NONE:  # as in tiktoken, even where merges would not lead there
                found[i] = FIRST_TOKEN - token
                continue
            if length > MERGED_BYTES or n_parts + merged_width(length) > len(parts) - BLOCK * LANES:
                found[i] = LONG_WORD
                continue
        merging[n_merged, 0], merging[n_merged, 1], merging[n_merged, 2], found[i] = at, length, n_parts, MERGED
        n_merged += 1
        n_parts += merged_width(length)
    if n_merged:
        merge_words(text, n_merged, byte_ids, byte_pairs, pairs, scratch)
    n_merged = 0
    for i in range(n_words):
        row = found[i]
        if row >= 0:
            first, last = rows[uint64(row), 2], rows[uint64(row), 3]
            m, at = int64(last >> uint64(56)), uint64(n)
            # writing all is faster than a branch on how many there are
            ids[at], ids[at + ONE] = uint32(first), uint32(first >> uint64(32))
            ids[at + uint64(2)], ids[at + uint64(3)] = uint32(last), uint32(last >> uint64(32)) & uint32(NONE)
            if m > CACHED_IDS:
                append(ids, n, spilled, int64(first), m)
            n += m
        elif row == MERGED:
            first, m = merging[n_merged, 2], merging[n_merged, 3]
            if merging[n_merged, 1] <= SHORT:
                remember(rows, spilled, room, keys[i, 0], keys[i, 1], parts, first, m)
            n = append(ids, n, parts, first, m)
            n_merged += 1
        elif row == LONG_WORD:
            length = ends[i + 1] - ends[i]
            long_parts, long_ranks = np.empty(length, np.int64), np.empty(length, np.int64)
            m = merge_long_word(text, ends[i], length, byte_ids, byte_pairs, pairs, starts, long_parts, long_ranks)
            n = append(ids, n, long_parts, 0, m)
        else:
            ids[n] = FIRST_TOKEN - row
            n += 1
    return n


@compiled
def append(ids, n, parts, first, m):
    """Writes m of `parts`, from `first` on, to ids[n]; returns the index after them."""
    for i in range(m):
        ids[n + i] = parts[first + i]
    return n + m


@compiled
def remember(rows, spilled, room, low, high, parts, first, m):
    """Adds a word to the cache, whose ids are m of `parts`, from `first` on, unless it is there or the cache is full."""
    row = cached_row(rows, low, high, home_row(rows, low, high))
    if rows[row, 1] or room[0] == 0:
        return
    if m > CACHED_IDS:
        if room[1] + m > len(spilled):
            room[0] = 0
            return
        rows[row, 2] = uint64(room[1])
        room[1] = append(spilled, room[1], parts, first, m)
    else:  # entries beyond m are left-overs
        rows[row, 2] = uint64(parts[first]) | uint64(parts[first + 1]) << uint64(32)
    rows[row, 3] = uint64(parts[first + 2]) | uint64(parts[first + 3] & uint32(NONE)) << uint64(32) | uint64(m) << uint64(56)
    rows[row, 0], rows[row, 1] = low, high
    room[0] -= 1


@kernel
def encode_documents(text, offsets, prefixes, splitter, vocabulary, cache, ids, id_offsets):
    """Writes the ids of the documents text[offsets[i]:offsets[i + 1]], each after prefixes[i] unless that is negative,
    into ids[id_offsets[i]:id_offsets[i + 1]]. `ids` has room for all prefixes and bytes, and `PADDING` more."""
    ends = np.empty(BLOCK + 1, np.int64)
    id_offsets[0] = 0
    for i in range(len(offsets) - 1):
        at = id_offsets[i]
        if prefixes[i] >= 0:
            ids[at] = prefixes[i]
            at += 1
        n, ends[0] = 0, offsets[i]
        while ends[n] < offsets[i + 1]:
            ends[0] = ends[n]
            n = scan(text, offsets[i + 1], splitter, ends)
            at = encode_block(text, ends, n, vocabulary, cache, ids, at)
        id_offsets[i + 1] = at
