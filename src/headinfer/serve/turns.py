"""Whose turn it is: the clients one after the other, and the tasks of each client in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal, Protocol

__all__ = ["Kind", "Step", "Task", "Turns"]

Kind = Literal["answer", "read"]
Step = Literal["goes on", "later", "done"]
"""What a step of a task says: the task goes on, it cannot begin before another one ends, or it has ended."""


class Task(Protocol):
    """Work that is done in steps.

    Attributes:
        client: who asked for it.
        kind: "answer" for a request, "read" for a document. Each client has one queue of each kind, so that it can ask
            while its document is being read.
    """

    client: str
    kind: Kind

    @property
    def is_cancelled(self) -> bool:
        """Whether it must end."""


class Turns:
    """The tasks of all clients. A lock of the caller protects it.

    Args:
        most: how many tasks of each kind may be under way at a time. Each of them holds a cache.
    """

    def __init__(self, most: Mapping[Kind, int]) -> None:
        self._most = most
        self._queues: dict[tuple[str, Kind], deque[Task]] = {}  # the queue whose turn is next comes first
        self._begun: list[Task] = []

    def add(self, task: Task) -> None:
        """Add a task to the queue of its client."""
        self._queues.setdefault((task.client, task.kind), deque()).append(task)

    def remove(self, task: Task) -> None:
        """Remove a task, if it is there."""
        key = (task.client, task.kind)
        queue = self._queues.get(key)
        if queue is not None and task in queue:
            queue.remove(task)
            if not queue:
                del self._queues[key]
        self.put_back(task)

    def put_back(self, task: Task) -> None:
        """Note that a task has not begun, since it must wait for another one. It stays in its queue."""
        if task in self._begun:
            self._begun.remove(task)

    def next(self) -> Task | None:
        """Return the task whose turn it is, which has begun now; None if there is none.

        Tasks that were cancelled come first, since they only end.
        """
        for task in self.tasks():
            if task.is_cancelled:
                return task
        for key in list(self._queues):
            task = self._queues[key][0]
            if task in self._begun or self._count(task.kind) < self._most[task.kind]:
                self._queues[key] = self._queues.pop(key)  # the last one now
                if task not in self._begun:
                    self._begun.append(task)
                return task
        return None

    def tasks(self) -> list[Task]:
        """Return all tasks."""
        return [task for queue in self._queues.values() for task in queue]

    def waiting(self) -> list[Task]:
        """Return the tasks that have not begun."""
        return [task for task in self.tasks() if task not in self._begun]

    def begun(self) -> list[Task]:
        """Return the tasks that have begun."""
        return list(self._begun)

    def _count(self, kind: Kind) -> int:
        return sum(task.kind == kind for task in self._begun)
