"""One client process of `tests.benchmarks.load`: told what to do on stdin, reports on stdout."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

from grpc import aio

from router.v1 import router_service_pb2 as messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from tests.benchmarks.catalog_model import tasks_of
from tests.benchmarks.empty_server import METHOD

# began, ended, items, code, revision, tasks, said: see `load.Call`.
Row = tuple[float, float, int, str, int, str, str]
_MOST_PROBLEMS = 5
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


class Worker:
    """The callers of one process."""

    def __init__(self, told: dict) -> None:
        self.told = told
        self.channels = [
            aio.insecure_channel(told["target"], options=_OPTIONS)
            for _ in range(told["connections"])
        ]
        stubs = [RouterServiceStub(channel) for channel in self.channels]
        self.stubs = itertools.cycle(stubs)
        self.empty = self.channels[0].unary_unary(METHOD)
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.requests = self._requests()
        self.until = 0.0

    async def ready(self) -> None:
        """Wait until all connections are there."""
        for channel in self.channels:
            await asyncio.wait_for(channel.channel_ready(), 60)

    async def run(self, begin: float, until: float) -> None:
        """Call from `begin` to `until` (monotonic), or until the requests are used up."""
        self.until = until
        await asyncio.sleep(begin - time.monotonic())
        if self.told["rate"]:
            await self._open_loop()
            return
        caller = self._stream if self.told["method"] == "StreamRoute" else self._caller
        await asyncio.gather(*(caller() for _ in range(self.told["callers"])))

    async def close(self) -> None:
        """Close the connections."""
        for channel in self.channels:
            await channel.close()

    def _requests(self) -> Iterator[object]:
        """The requests, made beforehand so that clients cost little; without end unless once."""
        told = self.told
        texts, method = told["texts"], told["method"]
        if method == "Empty":
            made: list[object] = [b""]
        elif method == "BatchRoute":
            size = told["batch"]
            places = range(0, len(texts), size)
            made = [
                messages.BatchRouteRequest(texts=[texts[(i + n) % len(texts)] for n in range(size)])
                for i in places
            ]
        elif method == "Generate":
            made = [
                messages.GenerateRequest(
                    text=text, task=task, max_output_tokens=told["max_output_tokens"]
                )
                for text, task in zip(texts, told["tasks"] or [""] * len(texts), strict=True)
            ]
        elif method == "StreamRoute":
            made = [messages.StreamRouteRequest(text=text) for text in texts]
        else:
            made = [messages.RouteRequest(text=text) for text in texts]
        return iter(made) if told["once"] else itertools.cycle(made)

    async def _caller(self) -> None:
        """One call after the other."""
        call = getattr(self, f"_{self.told['method'].lower()}")
        for request in self.requests:
            if not self.told["once"] and time.monotonic() >= self.until:
                return
            await self._timed(call, request)

    async def _open_loop(self) -> None:
        """A call every 1/rate seconds, as far as this process comes to it."""
        call = getattr(self, f"_{self.told['method'].lower()}")
        running: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        for number in itertools.count():
            due = began + number / self.told["rate"]
            if due >= self.until:
                break
            await asyncio.sleep(max(due - time.monotonic(), 0))
            task = asyncio.create_task(self._timed(call, next(self.requests)))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _timed(
        self, call: Callable[[object], Awaitable[tuple[int, int, str]]], request: object
    ) -> None:
        began = time.monotonic()
        items, revision, task, code, said = 0, 0, "", "OK", ""
        try:
            items, revision, task = await call(request)
        except aio.AioRpcError as error:
            code, said = error.code().name, error.details() or ""
            if code != "RESOURCE_EXHAUSTED" and len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(f"{code}: {said}")
        self.rows.append((began, time.monotonic(), items, code, revision, task, said))

    async def _empty(self, request: object) -> tuple[int, int, str]:
        await self.empty(request, timeout=self.told["timeout"])
        return 1, 0, ""

    async def _route(self, request: object) -> tuple[int, int, str]:
        answer = await next(self.stubs).Route(request, timeout=self.told["timeout"])
        return 1, answer.revision, tasks_of([answer.decision])

    async def _batchroute(self, request: object) -> tuple[int, int, str]:
        answer = await next(self.stubs).BatchRoute(request, timeout=self.told["timeout"])
        if any(decision.revision != answer.revision for decision in answer.decisions):
            self.problems.append("a batch that was decided by more than one revision")
        return len(answer.decisions), answer.revision, tasks_of(answer.decisions)

    async def _generate(self, request: object) -> tuple[int, int, str]:
        responses = next(self.stubs).Generate(request, timeout=self.told["timeout"])
        revisions, decisions, kind = set(), [], ""
        async for response in responses:
            revisions.add(response.revision)
            kind = response.WhichOneof("event")
            if kind == "decision":
                decisions.append(response.decision)
        if kind != "summary" or len(decisions) != 1 or len(revisions) != 1:
            self.problems.append(f"an answer with revisions {revisions} that ends with {kind!r}")
        return 1, *revisions, tasks_of(decisions)

    async def _stream(self) -> None:
        """One stream, with `outstanding` texts on their way."""
        stream = next(self.stubs).StreamRoute(timeout=None)
        sent: list[float] = []

        async def send() -> bool:
            request = next(self.requests, None)
            over = not self.told["once"] and time.monotonic() >= self.until
            if request is None or over:
                return False
            sent.append(time.monotonic())
            await stream.write(request)
            return True

        try:
            for _ in range(self.told["outstanding"]):
                await send()
            received, open_ = 0, True
            while received < len(sent):
                response = await stream.read()
                if response is aio.EOF:
                    self.problems.append("a stream that ended early")
                    break
                code = "OK" if response.HasField("decision") else response.error.reason
                row = (sent[received], time.monotonic(), 1, code, response.revision)
                found = tasks_of([response.decision]) if code == "OK" else ""
                self.rows.append((*row, found, response.error.message))
                received += 1
                if open_ and not await send():
                    open_ = False
                    await stream.done_writing()
        except aio.AioRpcError as error:
            code, said = error.code().name, error.details() or ""
            self.rows.append((sent[-1], time.monotonic(), 0, code, 0, "", said))
            self.problems.append(f"{code}: {said}")


async def _main() -> None:
    worker = Worker(json.loads(sys.stdin.readline()))
    await worker.ready()
    print(json.dumps("ready"), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        told = json.loads(line)
        worker.rows, worker.problems = [], []
        gc.collect()
        gc.freeze()
        cpu = time.process_time()
        await worker.run(told["begin"], told["until"])
        result = {
            "calls": worker.rows,
            "cpu": time.process_time() - cpu,
            "problems": worker.problems,
        }
        print(json.dumps(result), flush=True)
    await worker.close()


if __name__ == "__main__":
    asyncio.run(_main())
