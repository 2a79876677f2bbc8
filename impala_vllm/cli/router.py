"""`impala router`: a fleet of vLLM servers behind one OpenAI-compatible address."""

import contextlib
import gc
import importlib.util
import logging
import os
import sys
from pathlib import Path

import click

from impala_vllm.config import ConfigError

_NEEDS = {"aiohttp": "aiohttp", "starlette": "starlette", "uvicorn": "uvicorn", "zmq": "pyzmq"}
"""Module -> what to install."""


@click.command()
@click.option("--worker", "workers", multiple=True, metavar="URL", help="A vLLM server; once for each.")
@click.option(
    "--kv-events",
    "events",
    multiple=True,
    metavar="URL=ENDPOINT",
    help="Where a worker publishes KV events, as tcp://HOST:PORT[,REPLAY]; without it, where its handshake says.",
)
@click.option(
    "--workers-file", type=click.Path(path_type=Path, dir_okay=False), help="Workers, one a line; read again."
)
@click.option(
    "--registry",
    default="memory",
    show_default=True,
    help="`memory`: this router is alone; redis://HOST:PORT/DB: several share what they hear and how busy servers are.",
)
@click.option("--tokenizer", help="Directory or name; without it, the workers' own.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--server-key", envvar="IMPALA_SERVER_KEY", help="API key for the workers' handshakes; clients' keys pass."
)
@click.option("--admin-key", envvar="IMPALA_ADMIN_KEY", help="Key for /v1/impala; without it, this machine only.")
@click.option(
    "--max-body-mib",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Of a request; more is refused (413).",
)
@click.option(
    "--max-held-mib",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="Of all requests whose answer has not begun; more is refused (503).",
)
@click.option(
    "--body-timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Of silence in the middle of a request; it is refused then (408).",
)
@click.option("--explain", is_flag=True, help="Log each decision, and put it in a response header.")
def router(
    workers: tuple[str, ...],
    events: tuple[str, ...],
    workers_file: Path | None,
    registry: str,
    tokenizer: str | None,
    host: str,
    port: int,
    server_key: str | None,
    admin_key: str | None,
    max_body_mib: int,
    max_held_mib: int,
    body_timeout: float,
    explain: bool,
) -> None:
    """Route turns to where their prefix is. Clients speak OpenAI's API to it as to one server."""
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed; `pip install 'impala-vllm[router]'`")
    if not workers and workers_file is None:
        raise ConfigError("no workers; add --worker URL or --workers-file FILE")
    if max_held_mib < max_body_mib:
        raise ConfigError(f"--max-held-mib {max_held_mib}: below --max-body-mib {max_body_mib}; one body must fit")

    import uvicorn

    from impala_vllm.fleet.addresses import AddressError, parse_address, parse_file
    from impala_vllm.fleet.proxy import BodyConfig, Gateway, RouterOptions, build
    from impala_vllm.fleet.registry import RegistryError

    try:
        urls = [parse_address(url) for url in workers]
        published = {parse_address(text).url: parse_address(text).events for text in events}
        if workers_file is not None:
            parse_file(workers_file.read_text(encoding="utf-8"), str(workers_file))
    except AddressError as e:
        raise ConfigError(str(e)) from e
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not text"
        raise ConfigError(f"{workers_file}: cannot read it ({reason}); write one http://HOST:PORT a line") from e
    for url, endpoints in published.items():
        if url not in {address.url for address in urls} or endpoints is None:
            raise ConfigError(f"--kv-events {url}: write URL=tcp://HOST:PORT with the URL of a --worker")
    addresses = tuple(address._replace(events=published.get(address.url)) for address in urls)
    options = RouterOptions(
        addresses,
        workers_file=workers_file,
        tokenizer=tokenizer,
        server_key=server_key,
        admin_key=admin_key,
        explains=explain,
        bodies=BodyConfig(max_body_mib << 20, max_held_mib << 20, silence_s=body_timeout),
        registry=None if registry == "memory" else registry,
    )
    try:
        gateway = Gateway(options)
    except RegistryError as e:
        raise ConfigError(f"--registry {e}") from e
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its worker threads are ours
    _raise_open_files()
    _pause_less()
    gateway.fleet.families.on_loaded = _keep
    uvicorn.run(
        build(options, gateway),
        host=host,
        port=port,
        log_config=None,  # its lines go where ours go: the address it serves at, with the port that 0 became
        access_log=False,
        proxy_headers=False,  # whoever asks is the peer, whatever a header says
        timeout_graceful_shutdown=600,
        timeout_keep_alive=75,  # longer than clients and load balancers keep an idle connection
    )


def _pause_less() -> None:
    """Threads that hash give way to the event loop within half a millisecond; garbage is looked for less often."""
    sys.setswitchinterval(0.0005)
    gc.set_threshold(20_000, 20, 50)


def _keep() -> None:
    """What is loaded by now stays: half a million objects that no collection needs to look at again."""
    gc.collect()
    gc.freeze()


def _raise_open_files() -> None:
    """Each stream takes two descriptors, and shells begin with a soft limit of 1,024."""
    try:
        import resource
    except ImportError:  # no such limits here
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
