"""Asks a Service as the HTTP layer does, and waits for what it says. Also counts the tokens that its model reads."""

import threading
from contextlib import contextmanager

from headinfer.serve.events import Done, Failed, Queued, Text
from headinfer.serve.requests import Ask

WAIT_S = 120


class Asked:
    """A request that was submitted, with its events."""

    def __init__(self, service, client="a client", on_event=lambda event: None, **request):
        self.events = []
        self._changed = threading.Condition()
        self._on_event = on_event
        if isinstance(request.get("messages"), str):
            request["messages"] = [{"role": "user", "content": request["messages"]}]
        self.work = service.submit(Ask(client, **request), self._take)

    def _take(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        if not isinstance(event, Queued):  # that comes before the request is under way
            self._on_event(event)

    def until(self, kind):
        """The first event of a kind, once it has come."""
        with self._changed:
            found = self._changed.wait_for(lambda: [one for one in self.events if isinstance(one, kind)], WAIT_S)
        assert found, self.events
        return found[0]

    @property
    def last(self):
        """The last event, once it has come."""
        return self.until((Done, Failed))

    @property
    def text(self):
        """The answer, once it is whole."""
        assert isinstance(self.last, Done), self.last
        return "".join(event.text for event in self.events if isinstance(event, Text))


def wait_until_read(service, name):
    """The state of a document, once it is read or has failed."""
    ended = threading.Event()
    while (state := service.document(name)).status in ("waiting", "reading"):
        ended.wait(0.01)
    return state


@contextmanager
def counted_tokens(service):
    """Yields a list of how many tokens each row of each forward pass has."""
    read = []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        read.append(ids.shape[1])

    model = service._served.model.get_decoder()
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()
