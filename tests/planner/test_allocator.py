"""The port of ggml's graph allocator: holes, merging, and when a tensor's memory is free again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.allocator import ALLOCATE, RELEASE, Allocator, align
from planner.tape import STEADY, Tape


def test_the_smallest_hole_that_fits_is_taken() -> None:
    """Best fit among the holes; the end of the buffer only where none fits."""
    heap = Allocator()
    a, b, c, d, e = (heap.allocate(size) for size in (512, 128, 256, 128, 384))
    heap.free(a, 512)
    heap.free(c, 256)
    assert (heap.allocate(256), heap.allocate(512), heap.allocate(128)) == (c, a, e + 384)
    assert (b, d) == (512, 896)


def test_neighbouring_holes_merge() -> None:
    """Three tensors released in any order leave one hole."""
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        heap = Allocator()
        start = heap.state
        offsets = [heap.allocate(128) for _ in range(3)]
        for i in order:
            heap.free(offsets[i], 128)
        assert heap.state == start
        assert heap.peak == 384


def test_an_empty_hole_keeps_its_neighbours_apart() -> None:
    """A tensor of no bytes that is released inside a hole leaves another there; the first no longer joins what lies behind it."""
    heap = Allocator()
    a, empty, b, c = (heap.allocate(size) for size in (256, 0, 256, 128))
    assert empty == b
    heap.free(a, 256)
    heap.free(b, 256)
    heap.free(empty, 0)  # inside the hole of a and b
    heap.free(c, 128)
    assert heap.state[0] == (0, 256, 640)
    assert heap.state[1][:2] == (640, 0)
    assert heap.allocate(1024) == 640


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60))
def test_living_tensors_never_overlap(steps: list[tuple[bool, int]]) -> None:
    """Whatever comes and goes, no two living tensors share a byte, and the peak is the highest byte used."""
    heap, living, highest = Allocator(), [], 0
    for takes, number in steps:
        if takes or not living:
            size = align(number)
            offset = heap.allocate(size)
            assert all(offset + size <= o or o + s <= offset for o, s in living)
            living.append((offset, size))
            highest = max(highest, offset + size)
        else:
            heap.free(*living.pop(number % len(living)))
    assert heap.peak == highest
    for offset, size in living:
        heap.free(offset, size)
    assert heap.state == Allocator().state


def test_a_result_takes_over_memory_that_nobody_else_reads() -> None:
    """An element-wise result lies in its operand's place, unless another reader comes later."""
    tape = Tape()
    x = tape.op(1000)
    y = tape.op(1000, x, into=(x,))
    z = tape.op(1000, y, into=(y,))
    tape.use(y, z)
    heap, slots = Allocator(), {}
    program = tape.compile({-1: z}, sizes={})
    heap.replay(program.steps, slots)
    assert heap.peak == 2 * align(1000)
    assert [slots[slot] for _, slot in program.exports] == [align(1000)]


def test_a_result_of_no_bytes_is_allocated_and_released() -> None:
    """It takes a slot and gives it back, unlike what is computed elsewhere."""
    tape = Tape()
    tape.use(tape.empty(-1))
    tape.use(-1)
    assert [step[0] for step in tape.compile({}, sizes={}).steps] == [ALLOCATE, RELEASE]


def test_a_kept_tensor_of_the_caller_is_never_released() -> None:
    """An input with copies outlives its last reader; an ordinary one makes room."""
    tape = Tape()
    tape.op(256, -1)
    sizes = {-1: (256, STEADY)}
    released = tape.compile({}, sizes=sizes).steps
    kept = tape.compile({}, sizes=sizes, kept=(-1,)).steps
    assert (RELEASE, -1, 256) in released
    assert (RELEASE, -1, 256) not in kept


def test_a_compiled_tape_serves_every_context() -> None:
    """What attention makes grows with the cells it sees; all else stays, and only tensors that grow alike share memory."""
    tape = Tape()
    scores = tape.op(0, -1, growth=(8, 0))
    softened = tape.in_place(scores, -2)
    tape.op(1000, softened, into=(softened,))
    program = tape.compile({}, sizes={-1: (512, STEADY), -2: (0, (0, 2))}, kept=(-1,))
    for cells, window_cells in ((256, 256), (4096, 1024)):
        sizes = (8 * cells, 2 * window_cells, align(1000), 8 * cells)
        assert tuple(size for _, _, size in program.at(cells, window_cells)) == sizes


def test_inputs_arrive_where_a_tape_says_and_the_rest_together() -> None:
    """Only what it is compiled to bring; what is read later is the copy, which is exported; ``but`` waits for its own place."""
    tape = Tape()
    tape.use(-1)
    tape.rest_arrives(but=(-2,))
    x = tape.op(512, -1, -2)
    tape.arrives(-2)
    tape.use(x, -2)
    sizes = {-1: (128, STEADY), -2: (256, STEADY), -3: (384, STEADY)}
    taken = [
        size for action, _, size in tape.compile({}, sizes=sizes, kept=sizes, brings=(-3, -2, -1)).steps if action == ALLOCATE
    ]
    assert taken == [384, 128, 512, 256]
    program = tape.compile({}, sizes=sizes, kept=sizes, brings=(-2,))
    assert [step for step in program.steps if step[0] == ALLOCATE][1:] == [(ALLOCATE, program.exports[0][1], 256)]
    assert [name for name, _ in program.exports] == [-2]
