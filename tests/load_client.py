#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A crowd of clients for a running vLLM server: bursts, mixed lengths, and callers who hang up.

    python tests/load_client.py --url http://127.0.0.1:8000 --requests 5000 --concurrency 128 --pid PID --json load.json

Every request is greedy and one of a few, each of which is first answered alone. In bf16 on a GPU the order of a sum depends on the
batch, so an answer may leave that one at a tie: where the token that it takes was within --tie-margin of the likeliest. Any other
difference is an error. In float32 nothing may differ (--exact).

Exit status: 0 all is well, 1 a request failed, is stuck or was answered otherwise than alone, 2 the server cannot be used.
"""

import argparse
import asyncio
import collections
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

KINDS = {"answer": 4, "stream": 3, "cancel": 2, "disconnect": 1}  # and how often
DISTINCT = 24  # requests that are first answered alone
STUCK_S = 60  # after the last request's end: longer than any answer


class Unusable(Exception):
    """The server cannot be used; the message says why."""


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }


def draw_requests(rng: random.Random, max_prompt: int, max_tokens: int) -> list[Request]:
    """Short and long ones in equal parts of the logarithm. Token ids below 1000 are plain text in every vocabulary."""

    def length(longest: int) -> int:
        return round(longest ** rng.random())

    return [Request(tuple(rng.choices(range(10, 1000), k=length(max_prompt))), length(max_tokens)) for _ in range(DISTINCT)]


@dataclass
class Alone:
    """The answer that a request got alone: its tokens, and at each position all tokens that the tie margin lets stand for it."""

    tokens: list[int]
    ties: list[set[int]]

    def compare(self, tokens: list[int]) -> str:
        """ "equal", "tied" or "differing": what another answer (or its beginning) is; behind a tie the texts are different ones."""
        pairs = zip(tokens, self.tokens, self.ties, strict=False)
        first = next(((token, ties) for token, own, ties in pairs if token != own), None)
        if first is None:
            return "equal" if len(tokens) <= len(self.tokens) else "differing"
        return "tied" if first[0] in first[1] else "differing"


class Crowd:
    """What happened to the requests of one run."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession, alone: dict[Request, Alone]):
        self.url, self.model, self.session, self.alone = url, model, session, alone
        self.kinds: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.answers: collections.Counter[str] = collections.Counter()

    async def one(self, kind: str, request: Request, patience: float) -> None:
        """patience: the part of the answer after which `cancel` hangs up, and the seconds before `disconnect` does."""
        self.kinds[kind] += 1
        try:
            if kind == "disconnect":
                await self.hang_up(request, patience)
            else:
                enough = max(1, round(patience * request.max_tokens)) if kind == "cancel" else None
                tokens = await ask(self.session, self.url, self.model, request, stream=kind != "answer", enough=enough)
                whole = enough is not None or len(tokens) == request.max_tokens
                self.answers[self.alone[request].compare(tokens) if whole else "differing"] += 1
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.failures.append(f"{kind}: {type(error).__name__}: {error}")

    async def hang_up(self, request: Request, seconds: float) -> None:
        body, impatient = request.body(self.model, stream=False), aiohttp.ClientTimeout(total=0.3 * seconds)
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body, timeout=impatient) as response:
                await response.read()
        except TimeoutError:
            pass

    async def send(self, count: int, concurrency: int, rng: random.Random) -> None:
        """`count` requests in bursts of up to `concurrency`, never more than that at once."""
        gate = asyncio.Semaphore(concurrency)
        requests = list(self.alone)

        async def gated(*arguments: Any) -> None:
            async with gate:
                await self.one(*arguments)

        async with asyncio.TaskGroup() as tasks:
            while count > 0:
                burst = min(count, rng.randint(1, concurrency))
                count -= burst
                for kind in rng.choices(list(KINDS), list(KINDS.values()), k=burst):
                    tasks.create_task(gated(kind, rng.choice(requests), rng.random()))
                await asyncio.sleep(0.2 * rng.random())


async def ask_alone(session: aiohttp.ClientSession, url: str, model: str, request: Request, tie_margin: float) -> Alone:
    """tie_margin: nats below the likeliest token."""
    body = request.body(model, stream=False) | {"logprobs": 5, "return_tokens_as_token_ids": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
        [choice] = (await response.json())["choices"]
    ties = []
    for likely in choice["logprobs"]["top_logprobs"]:
        least = max(likely.values()) - tie_margin
        ties.append({int(name.removeprefix("token_id:")) for name, logprob in likely.items() if logprob >= least})
    return Alone(choice["token_ids"], ties)


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, request: Request, stream: bool = False, enough: int | None = None
) -> list[int]:
    """The answer's token ids; with `enough` the connection is closed when that many have come. ValueError for an error in the answer."""
    async with session.post(f"{url}/v1/completions", json=request.body(model, stream)) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
        if not stream:
            return (await response.json())["choices"][0]["token_ids"]
        tokens: list[int] = []
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise ValueError(f"error in the stream: {event['error']}")
            for choice in event["choices"]:
                tokens += choice["token_ids"] or []
            if enough is not None and len(tokens) >= enough:
                response.close()  # leaving the block would read on
                break
        return tokens


async def open_requests(session: aiohttp.ClientSession, url: str) -> dict[str, int]:
    """{"running", "waiting"}: requests that the engine still holds, when there are none or after STUCK_S seconds."""
    deadline = time.monotonic() + STUCK_S
    while True:
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
        held = {state: 0 for state in ("running", "waiting")}
        for state, value in re.findall(r"^vllm:num_requests_(running|waiting)\{.*\} (\S+)$", text, re.M):
            held[state] += int(float(value))
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        await asyncio.sleep(0.1)


def resident_mib(pid: int) -> float:
    """Resident memory of a process and all its descendants."""
    import psutil

    server = psutil.Process(pid)
    return round(sum(process.memory_info().rss for process in (server, *server.children(recursive=True))) / 2**20, 1)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    requests = draw_requests(rng, options.max_prompt, options.max_tokens)
    patient = aiohttp.ClientTimeout(total=options.timeout)
    async with aiohttp.ClientSession(timeout=patient, connector=aiohttp.TCPConnector(limit=0)) as session:
        try:
            async with session.get(f"{options.url}/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            margin = 0.0 if options.exact else options.tie_margin
            alone = {request: await ask_alone(session, options.url, model, request, margin) for request in requests}
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise Unusable(f"{options.url}: {type(error).__name__}: {error}") from error
        crowd = Crowd(options.url, model, session, alone)
        memory, started = [], time.monotonic()
        # Four quarters: the first brings the server to its working size, the later ones show whether it still grows.
        for quarter in range(4):
            await crowd.send(options.requests // 4 + (quarter < options.requests % 4), options.concurrency, rng)
            if options.pid:
                memory.append(resident_mib(options.pid))
        seconds = time.monotonic() - started
        held = await open_requests(session, options.url)
    return {
        "requests": options.requests,
        "concurrency": options.concurrency,
        "seed": options.seed,
        "kinds": dict(crowd.kinds),
        "seconds": round(seconds, 1),
        "answers": {kind: crowd.answers[kind] for kind in ("equal", "tied", "differing")},
        "failed": len(crowd.failures),
        "failures": crowd.failures[:10],
        "held_at_the_end": held,
        "resident_mib_by_quarter": memory,
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="how many in all (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="at most so many at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same requests (default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=128, help="tokens of the longest prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of the longest answer (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a request has failed (default: %(default)s)")
    parser.add_argument("--pid", type=int, help="the server's process here, whose memory is then measured")
    parser.add_argument("--tie-margin", type=float, default=0.5, help="nats between two right bf16 runs (default: %(default)s)")
    parser.add_argument("--exact", action="store_true", help="no tie margin: float32 on the CPU")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    return parser


def main() -> int:
    options = parser().parse_args()
    try:
        result = asyncio.run(run(options))
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return int(bool(result["failed"] or any(result["held_at_the_end"].values()) or result["answers"]["differing"]))


if __name__ == "__main__":
    sys.exit(main())
