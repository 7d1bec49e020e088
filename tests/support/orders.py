"""A model checker for the queues of kv/streams.py, which the ring, the write-back and the exchange use.

`Recorded` is a `Streams` that runs nothing and records the jobs of each queue. `explore` runs the recorded jobs in
every order that the queues and events allow. A job takes time: its destination is torn from the beginning of the job
until its end, and then contains the value of the source if the source did not change meanwhile. Jobs of different
queues may overlap in any way. Values are symbols, and each kernel compares the symbols that it reads with the expected
ones. `unordered` checks recordings that are too long to explore: two jobs that access the same bytes must be ordered by
queues and events if at least one of them writes.

The host's CPU is one more actor, "cpu", with jobs of its own. finish() lets its next job wait for an event, and its
jobs come before all jobs that are queued after them.
"""

import bisect
import itertools
from collections import defaultdict
from dataclasses import dataclass, field

QUEUES = ("compute", "fetch", "back", "host", "cpu")
TORN = "torn"


@dataclass(eq=False)
class Event:
    """After recording, marks a position in a queue: all jobs before it are done."""

    queue: str = ""
    jobs: int = 0


@dataclass
class Job:
    """A copy or a kernel of a queue.

    Attributes:
        queue: the queue.
        number: the position in the queue.
        after: pairs (queue, jobs): the job begins after this number of jobs of the other queue.
        reads: the byte ranges [begin, end) that it reads.
        writes: the byte ranges [begin, end) that it writes.
        wanted: the values that a kernel, or the host, must read.
        value: the value that a kernel, or the host, writes.
        what: "copy", "kernel reads", "kernel writes" or "host".
    """

    queue: str
    number: int
    after: tuple = ()
    reads: tuple = ()
    writes: tuple = ()
    wanted: object = None
    value: object = None
    what: str = ""


def cells_of(tensor):
    """The byte range of a contiguous tensor."""
    assert tensor.is_contiguous()
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


@dataclass
class Recorded:
    """Streams that only record jobs. `read` and `write` record kernels of the compute queue, `attend` one of the
    host."""

    jobs: dict = field(default_factory=lambda: {queue: [] for queue in QUEUES})
    waiting: dict = field(default_factory=lambda: {queue: [] for queue in QUEUES})
    kept: list = field(default_factory=list)  # keeps tensors alive, so that no address is reused

    def event(self):
        return Event()

    def record(self, event, queue):
        event.queue = queue
        event.jobs = len(self.jobs[queue])

    def wait(self, event, queue):
        if event.queue and event.queue != queue and event.jobs:
            self.waiting[queue].append((event.queue, event.jobs))

    def copy(self, copies, queue):
        for destination, source in copies:
            assert destination.numel() == source.numel()
            self.kept += [destination, source]
            self.add(queue, tuple(parts(source)), tuple(parts(destination)), what="copy")

    def finish(self, event):
        self.wait(event, "cpu")

    def write_back_done(self):
        return lambda: None

    def drain(self):
        """Do nothing: no job runs."""

    def add(self, queue, reads=(), writes=(), **more):
        done_by_host = len(self.jobs["cpu"])
        if queue != "cpu" and done_by_host:
            self.waiting[queue].append(("cpu", done_by_host))
        after = tuple(self.waiting[queue])
        self.waiting[queue] = []
        self.jobs[queue].append(Job(queue, len(self.jobs[queue]), after, tuple(reads), tuple(writes), **more))

    def read(self, tensors, wanted=None):
        """Record a kernel that reads tensors and must find the values `wanted`, in this order."""
        self.kept += tensors
        self.add("compute", [part for x in tensors for part in parts(x)], wanted=wanted, what="kernel reads")

    def write(self, tensors, value):
        """Record a kernel that writes new K or V."""
        self.kept += tensors
        self.add("compute", (), [part for x in tensors for part in parts(x)], value=value, what="kernel writes")

    def attend(self, tensors, results, wanted=None, value=None):
        """Record a kernel of the host, which reads tensors that have the values `wanted`, and writes results."""
        self.kept += [*tensors, *results]
        reads, writes = ([part for x in side for part in parts(x)] for side in (tensors, results))
        self.add("cpu", reads, writes, wanted=wanted, value=value, what="host")

    def all_jobs(self):
        return [job for queue in QUEUES for job in self.jobs[queue]]


def parts(tensor):
    """The contiguous byte ranges of a tensor with any strides."""
    if tensor.is_contiguous():
        return [cells_of(tensor)]
    return [part for row in tensor for part in parts(row)]


def explore(recorded, start=None):
    """Run the jobs in all possible orders.

    Args:
        recorded: the recorded jobs.
        start: the initial values of byte ranges, as {range: value}.

    Returns:
        The number of states, and a list of complaints about kernels that read wrong values.
    """
    jobs = recorded.jobs
    edges = cuts(recorded, start or {})
    cells = {edge: at for at, edge in enumerate(edges)}

    def within(ranges):
        return [cell for begin, end in ranges for cell in range(cells[begin], cells[end])]

    touched = {id(job): (within(job.reads), within(job.writes)) for job in recorded.all_jobs()}
    memory = ["nothing"] * len(edges)
    for byte_range, value in (start or {}).items():
        for cell in within([byte_range]):
            memory[cell] = value
    first = ((0,) * len(QUEUES), (None,) * len(QUEUES), tuple(memory))
    seen = {first}
    stack = [first]
    complaints = set()
    while stack:
        done, running, memory = stack.pop()
        for index, queue in enumerate(QUEUES):
            if running[index] is not None:  # the job ends
                following = end(jobs[queue][done[index]], running[index], memory, touched, complaints)
                state = (replaced(done, index, done[index] + 1), replaced(running, index, None), following)
            elif done[index] < len(jobs[queue]):
                job = jobs[queue][done[index]]
                if any(done[QUEUES.index(other)] < count for other, count in job.after):
                    continue
                reads, writes = touched[id(job)]
                found = tuple(memory[cell] for cell in reads)
                torn = list(memory)
                for cell in writes:
                    torn[cell] = TORN
                state = (done, replaced(running, index, found), tuple(torn))
            else:
                continue
            if state not in seen:
                seen.add(state)
                stack.append(state)
    assert any(done == tuple(len(jobs[queue]) for queue in QUEUES) for done, _, _ in seen), "no order runs all jobs"
    return len(seen), sorted(complaints)


def cuts(recorded, start):
    """The edges of memory cells. Source and destination of each copy are split at corresponding edges."""
    edges = {edge for job in recorded.all_jobs() for byte_range in (*job.reads, *job.writes) for edge in byte_range}
    edges |= {edge for byte_range in start for edge in byte_range}
    size = 0
    while len(edges) > size:
        size = len(edges)
        for job in recorded.all_jobs():
            if job.what == "copy":
                for one, other in ((job.reads, job.writes), (job.writes, job.reads)):
                    edges |= {counterpart(one, other, edge) for edge in edges} - {None}
    return sorted(edges)


def counterpart(ranges, others, edge):
    """The address that corresponds to `edge` on the other side of a copy; None if the copy does not contain it."""
    before = 0
    for begin, finish in ranges:
        if begin < edge < finish:
            offset = before + edge - begin
            for start, stop in others:
                if offset < stop - start:
                    return start + offset
                offset -= stop - start
        before += finish - begin
    return None


def end(job, found, memory, touched, complaints):
    """The memory after a job. It writes the values that it read, or TORN if they changed during the job."""
    reads, writes = touched[id(job)]
    now = tuple(memory[cell] for cell in reads)
    values = [before if before == after else TORN for before, after in zip(found, now, strict=True)]
    if job.wanted is not None:
        wanted = list(itertools.chain.from_iterable([value] * cells for value, cells in spread(job, reads)))
        if values != wanted:
            who = "the host" if job.what == "host" else "kernel"
            complaints.add(f"{who} {job.number} read {sorted(set(map(str, values)))} and not {job.wanted}")
    after = list(memory)
    if job.what != "copy":
        values = [job.value] * len(writes)
    assert len(values) == len(writes), "both sides of a copy have the same number of cells"
    for cell, value in zip(writes, values, strict=True):
        after[cell] = value
    return tuple(after)


def spread(job, reads):
    """The expected value of each range that a kernel reads, with the number of its cells."""
    wanted = job.wanted if isinstance(job.wanted, tuple) else (job.wanted,)
    share = len(reads) // len(wanted)
    return [(value, share) for value in wanted]


def replaced(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


def unordered(recorded):
    """Pairs of jobs that access the same bytes, at least one of them writing, and that have no defined order."""
    clocks = {}
    position = {}
    order = linear(recorded)
    for job in order:
        clock = dict.fromkeys(QUEUES, 0)
        if job.number:
            clock.update(clocks[job.queue, job.number - 1])
        for queue, count in job.after:
            for name, value in clocks[queue, count - 1].items():
                clock[name] = max(clock[name], value)
        clock[job.queue] = job.number + 1
        clocks[job.queue, job.number] = clock
        position[job.queue, job.number] = len(position)
    edges = sorted({edge for job in order for byte_range in (*job.reads, *job.writes) for edge in byte_range})
    touching = defaultdict(list)
    for job in order:
        for is_write, ranges in ((False, job.reads), (True, job.writes)):
            for begin, finish in ranges:
                for cell in range(bisect.bisect_left(edges, begin), bisect.bisect_left(edges, finish)):
                    touching[cell].append((job, is_write))
    found = set()
    for uses in touching.values():
        for (one, one_writes), (other, other_writes) in itertools.combinations(uses, 2):
            if one.queue == other.queue or not (one_writes or other_writes):
                continue
            before = clocks[other.queue, other.number][one.queue] > one.number
            behind = clocks[one.queue, one.number][other.queue] > other.number
            if not (before or behind):
                found.add((one.queue, one.number, one.what, other.queue, other.number, other.what))
    return sorted(found)


def linear(recorded):
    """One possible order of all jobs."""
    done = dict.fromkeys(QUEUES, 0)
    order = []
    while len(order) < len(recorded.all_jobs()):
        before = len(order)
        for queue in QUEUES:
            while done[queue] < len(recorded.jobs[queue]):
                job = recorded.jobs[queue][done[queue]]
                if any(done[other] < count for other, count in job.after):
                    break
                order.append(job)
                done[queue] += 1
        assert len(order) > before, "queues wait for each other"
    return order
