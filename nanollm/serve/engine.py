"""One thread does the work of all models, and the answers in the making take turns, a token each.

So a short answer does not wait for a long one, no two threads ever touch a model, and how much is held in memory has a bound: at most
`together` key/value caches, at most `queue` requests that wait. A server for many people puts the turns into one batch (continuous
batching, Yu et al. 2022, "Orca", section 3); this one is for looking at.
"""
import asyncio
import threading
import traceback
from collections import deque

from nanollm.serve.request import ApiError

END = object()


class Job:
    """A piece of work, a generator that runs in the engine's thread; what it yields arrives in `events`, an asyncio queue, at last END
    or an ApiError."""

    def __init__(self, work):
        self.work, self.events, self.loop, self.cancelled = work, asyncio.Queue(), asyncio.get_running_loop(), False

    def put(self, event):
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:                                 # the loop is closed: nobody listens any more
            self.cancelled = True


class Engine:
    def __init__(self, together, queue):
        self.together, self.queue = together, queue
        self.waiting, self.active, self.stopping = deque(), [], False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, work):
        """A Job for the generator `work`. Raises ApiError 429 when the queue is full, 503 at shutdown."""
        with self.changed:
            if self.stopping:
                raise ApiError(503, "the server is shutting down")
            if len(self.waiting) >= self.queue + self.together - len(self.active):
                raise ApiError(429, f"{self.together} answers are in the making and {self.queue} requests wait; try again in a moment",
                               code="rate_limit_exceeded")
            job = Job(work)
            self.waiting.append(job)
            self.changed.notify()
        return job

    def cancel(self, job):
        """Nobody wants the rest: a job that waits leaves the queue at once, one in the making ends before its next token."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self):
        """Safe in a signal handler: the thread looks at the flag before each token."""
        self.stopping = True

    def run(self):
        while not self.stopping:
            with self.changed:
                while self.waiting and len(self.active) < self.together:
                    self.active.append(self.waiting.popleft())
                if not self.active:
                    self.changed.wait(0.2)                   # not for ever: stop() wakes nobody
            self.active = [job for job in self.active if self.stopping or self.turn(job)]
        with self.changed:
            for job in [*self.active, *self.waiting]:
                job.work.close()
                job.put(ApiError(503, "the server is shutting down"))
            self.active, self.waiting = [], deque()

    def turn(self, job):
        """The next token of one answer; False when it is over."""
        if job.cancelled:
            job.work.close()
            return False
        try:
            job.put(next(job.work))
            return True
        except StopIteration:
            job.put(END)
        except ApiError as e:
            job.put(e)
        except Exception:                                    # ours, or no memory: this answer fails, the server goes on
            traceback.print_exc()
            job.put(ApiError(500, "the server failed at this request; its console says why"))
        return False
