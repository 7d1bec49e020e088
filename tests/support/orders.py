"""A model checker for the queues of kv/streams.py: every order that events allow, for what the ring and write-back do.

`Recorded` is a `Streams` that runs nothing and notes what each queue was given. `explore` then runs the notes in every
order that the queues and events allow. A device does not do a copy at once: each job begins, when its destination is
torn, and ends, when it holds what the source held all the while, so jobs of different queues overlap in every way.
Values are symbols: what was read where is compared with what should have been. `unordered` is the check for recordings
too long to explore: two jobs that touch the same bytes, one of them writing, must be ordered by queues and events.
"""

import bisect
import itertools
from collections import defaultdict
from dataclasses import dataclass, field

QUEUES = ("compute", "fetch", "back")
TORN = "torn"


@dataclass(eq=False)
class Event:
    """Points behind a job of a queue, once it is recorded."""

    queue: str = ""
    jobs: int = 0


@dataclass
class Job:
    """Something that a queue does: reads and writes byte ranges [begin, end) and waits for other queues before."""

    queue: str
    number: int
    after: tuple = ()  # (queue, jobs): so many of that queue's jobs are done
    reads: tuple = ()
    writes: tuple = ()
    wanted: object = None  # of a kernel: what it must read
    what: str = ""


def cells_of(tensor):
    """The bytes of a contiguous tensor."""
    assert tensor.is_contiguous()
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


@dataclass
class Recorded:
    """Streams that note. `read` and `write` stand for kernels of the compute queue."""

    jobs: dict = field(default_factory=lambda: {queue: [] for queue in QUEUES})
    waiting: dict = field(default_factory=lambda: {queue: [] for queue in QUEUES})
    kept: list = field(default_factory=list)  # tensors, so that no address is used twice

    def event(self):
        return Event()

    def record(self, event, queue):
        event.queue, event.jobs = queue, len(self.jobs[queue])

    def wait(self, event, queue):
        if event.queue and event.queue != queue and event.jobs:
            self.waiting[queue].append((event.queue, event.jobs))

    def copy(self, copies, queue):
        for destination, source in copies:
            assert destination.numel() == source.numel()
            self.kept += [destination, source]
            spans = parts(source)
            self.add(queue, tuple(spans), tuple(parts(destination)), what="copy")

    def finish(self, event):
        """The host does not wait in the loop; where it does, nothing is left to order."""

    def write_back_done(self):
        return lambda: None

    def drain(self):
        """Nothing runs."""

    def add(self, queue, reads=(), writes=(), wanted=None, what=""):
        after, self.waiting[queue] = tuple(self.waiting[queue]), []
        self.jobs[queue].append(Job(queue, len(self.jobs[queue]), after, tuple(reads), tuple(writes), wanted, what))

    def read(self, tensors, wanted=None):
        """A kernel that reads tensors; wanted: the values that it must find, in their order."""
        self.kept += tensors
        self.add("compute", [span for x in tensors for span in parts(x)], wanted=wanted, what="kernel reads")

    def write(self, tensors, value):
        """A kernel that makes new K or V."""
        self.kept += tensors
        self.add("compute", (), [span for x in tensors for span in parts(x)], wanted=value, what="kernel writes")

    def all_jobs(self):
        return [job for queue in QUEUES for job in self.jobs[queue]]


def parts(tensor):
    """The byte ranges of a tensor, of any strides, as contiguous runs."""
    if tensor.is_contiguous():
        return [cells_of(tensor)]
    return [span for row in tensor for span in parts(row)]


def explore(recorded, start=None):
    """Runs all orders. start: what byte ranges hold at first, as {range: value}.

    Returns (number of states seen, complaints): a complaint says which kernel read what instead of what it must.
    """
    jobs = recorded.jobs
    edges = cuts(recorded, start or {})
    cells = {edge: at for at, edge in enumerate(edges)}

    def within(spans):
        return [cell for begin, end in spans for cell in range(cells[begin], cells[end])]

    touched = {id(job): (within(job.reads), within(job.writes)) for job in recorded.all_jobs()}
    memory = ["nothing"] * len(edges)
    for span, value in (start or {}).items():
        for cell in within([span]):
            memory[cell] = value
    first = ((0,) * len(QUEUES), (None,) * len(QUEUES), tuple(memory))
    seen, stack, complaints = {first}, [first], set()
    while stack:
        done, running, memory = stack.pop()
        for index, queue in enumerate(QUEUES):
            if running[index] is not None:  # ends
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
    assert any(done == tuple(len(jobs[queue]) for queue in QUEUES) for done, _, _ in seen), "nothing gets to its end"
    return len(seen), sorted(complaints)


def cuts(recorded, start):
    """Where memory is cut into cells, such that a copy's source and destination are cut at the same places."""
    edges = {edge for job in recorded.all_jobs() for span in (*job.reads, *job.writes) for edge in span}
    edges |= {edge for span in start for edge in span}
    size = 0
    while len(edges) > size:
        size = len(edges)
        for job in recorded.all_jobs():
            if job.what == "copy":
                for one, other in ((job.reads, job.writes), (job.writes, job.reads)):
                    edges |= {counterpart(one, other, edge) for edge in edges} - {None}
    return sorted(edges)


def counterpart(spans, others, edge):
    """Where the byte `edge` of one side of a copy lies on the other side; None where it is not in it."""
    before = 0
    for begin, finish in spans:
        if begin < edge < finish:
            offset = before + edge - begin
            for start, stop in others:
                if offset < stop - start:
                    return start + offset
                offset -= stop - start
        before += finish - begin
    return None


def end(job, found, memory, touched, complaints):
    """What memory holds after a job: what it read, if that stayed as it was from its beginning to its end."""
    reads, writes = touched[id(job)]
    now = tuple(memory[cell] for cell in reads)
    values = [before if before == after else TORN for before, after in zip(found, now, strict=True)]
    if job.what == "kernel reads":
        wanted = list(itertools.chain.from_iterable([value] * cells for value, cells in spread(job, reads, touched)))
        if job.wanted is not None and values != wanted:
            complaints.add(f"kernel {job.number} read {sorted(set(map(str, values)))} and not {job.wanted}")
        return memory
    after = list(memory)
    if job.what == "kernel writes":
        values = [job.wanted] * len(writes)
    assert len(values) == len(writes), "ranges of a copy are cut at the same places"
    for cell, value in zip(writes, values, strict=True):
        after[cell] = value
    return tuple(after)


def spread(job, reads, touched):
    """The wanted value of each range that a kernel reads, and how many cells it has."""
    wanted = job.wanted if isinstance(job.wanted, tuple) else (job.wanted,)
    share = len(reads) // len(wanted)
    return [(value, share) for value in wanted]


def replaced(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


def unordered(recorded):
    """Pairs of jobs that touch the same bytes, one of them writing, and that neither queues nor events put in order."""
    clocks, position = {}, {}
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
    edges = sorted({edge for job in order for span in (*job.reads, *job.writes) for edge in span})
    touching = defaultdict(list)
    for job in order:
        for is_write, spans in ((False, job.reads), (True, job.writes)):
            for begin, finish in spans:
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
    """One order of all jobs that the queues and events allow."""
    done, order = dict.fromkeys(QUEUES, 0), []
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
