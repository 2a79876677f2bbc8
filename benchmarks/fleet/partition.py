"""How soon a router knows again what a server holds, once the network between them is back.

    python -m benchmarks.fleet.partition --parted-s 5,30 --repetitions 5 --record

Router and server (emulated, real KV events) live in two network namespaces of one machine; the cable between them is
pulled, the server goes on computing for others, and the cable is plugged in again. Linux, as root. The router is as
`impala router` runs it: of a partition of seconds it learns by its events alone, in a longer one it takes the server
for down and forgets it. Known again: open for requests, and the index says of every block what the server's pool does.
"""

import argparse
import asyncio
import json
import logging
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from benchmarks import record
from benchmarks.fleet.elsewhere import Elsewhere, NamespaceError
from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.hashing import Tokenizer
from impala_vllm.fleet.places import BlockKey, Replica, ServerId
from impala_vllm.fleet.proxy import Gateway, RouterOptions
from impala_vllm.replay import tiny_model
from impala_vllm.sim.timing import DEFAULT, load

HBM_TOKENS = 60_000
PROMPTS = 20
"""Computed before the partition and during it, each; more than fit together."""
PATIENCE_S = 120.0


def main() -> None:
    """Print one JSON line a partition, then medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.partition", description=main.__doc__)
    parser.add_argument("--parted-s", default="5,30", help="how long, one after the other")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it: its servers end with it
    lengths_s = [float(part) for part in args.parted_s.split(",")]
    try:
        found = asyncio.run(_measure(lengths_s, args.repetitions))
    except NamespaceError as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    for parted_s, values in found.items():
        print(json.dumps({"parted_s": parted_s, "known_again_s": statistics.median(values)}), file=sys.stderr)
    if args.record:
        origin = record.origin()
        print(
            record.append(
                [
                    origin.record("serving/partition", f"parted for {parted_s:g} s", {"blocks": HBM_TOKENS // 16},
                                  "known_again_s", "s", "lower", values)
                    for parted_s, values in found.items()
                ]
            )
        )  # fmt: skip


async def _measure(lengths_s: Sequence[float], repetitions: int) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {parted_s: [] for parted_s in lengths_s}
    with tempfile.TemporaryDirectory() as folder:
        tiny_model._tokenizer().save_pretrained(folder)  # pyright: ignore[reportPrivateUsage]
        tokenizer = Tokenizer(folder)
        for repetition in range(repetitions):
            for parted_s, values in found.items():
                values.append(await _once(tokenizer, Path(folder), parted_s))
                print(json.dumps({"parted_s": parted_s, "repetition": repetition, "known_again_s": values[-1]}))
    return found


async def _once(tokenizer: Tokenizer, folder: Path, parted_s: float) -> float:
    async with Elsewhere() as elsewhere:
        server = EmulatedServer(tokenizer, load(DEFAULT), speed=1e6, hbm_tokens=HBM_TOKENS, host=elsewhere.host)
        async with elsewhere.hosting(server):
            gateway = Gateway(RouterOptions((parse_address(server.url),), tokenizer=str(folder)))
            replica = Replica(ServerId(server.url))
            async with serving(gateway.options, gateway):
                keys = await elsewhere.run(_compute(server, "before"))
                await _known(gateway, replica, server, keys)
                await elsewhere.part()
                keys += await elsewhere.run(_compute(server, "meanwhile"))
                await asyncio.sleep(parted_s)
                await elsewhere.heal()
                return await _known(gateway, replica, server, keys)


async def _compute(server: EmulatedServer, name: str) -> list[BlockKey]:
    """Prompts that nobody has asked for, sent from where the server is; their blocks."""
    keys: list[BlockKey] = []
    async with aiohttp.ClientSession() as client:
        for number in range(PROMPTS):
            messages = [{"role": "user", "content": f"{name} {number} " * 600}]
            body = {"model": "emulated", "messages": messages, "max_tokens": 1}
            async with client.post(server.url + "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
            prompt = server.prompts.of_chat(body)
            assert prompt is not None
            keys += prompt.keys
    return keys


async def _known(gateway: Gateway, replica: Replica, server: EmulatedServer, keys: Sequence[BlockKey]) -> float:
    """Seconds until the router knows the server, and all it holds."""
    index, load_of, start_s = gateway.fleet.index, gateway.fleet.loads[replica], time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        while not (load_of.is_open and all(bool(index.holds(replica, k)) == server.pool.holds(k) for k in keys)):
            await asyncio.sleep(0.01)
    return time.monotonic() - start_s


if __name__ == "__main__":
    main()
