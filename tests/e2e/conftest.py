"""Real vLLM servers on the CPU, shared by the tests of this folder.

Starting an engine takes half a minute, so there are few of them and each serves many tests. A test that
looks at traces uses a `cache_salt` of its own: nothing is ever linked across salts.
"""

import json
import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from impala_vllm.replay import tiny_model
from impala_vllm.replay.server import Server
from tests.e2e.client import Client

BLOCK_SIZE = 32
MAX_TRACES = 32
READY_S = 420.0
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(items):
    """Everything here starts an engine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(900))  # a start on a busy machine takes minutes


@pytest.fixture(scope="session")
def model():
    return str(tiny_model.build("1m"))


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory):
    """A LoRA adapter with random weights, large enough to change outputs."""
    return random_adapter(model, tmp_path_factory.mktemp("adapter"), seed=1)


@pytest.fixture(scope="session")
def other_adapter(model, tmp_path_factory):
    return random_adapter(model, tmp_path_factory.mktemp("other-adapter"), seed=2)


def random_adapter(model, folder, seed):
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(model) / "config.json").read_text())
    heads = config["num_attention_heads"] * config["head_dim"]
    torch.manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, config["hidden_size"])
        weights[f"{name}.lora_B.weight"] = torch.randn(heads, 8)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return str(folder)


def command(model, *flags):
    """`vllm serve` as small as it gets."""
    vllm = str(Path(sys.executable).parent / "vllm")
    size = ["--max-model-len", "2048", "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", "512"]
    small = ["--enforce-eager", "--dtype", tiny_model.CPU_DTYPE, "--max-num-seqs", "16", "--served-model-name", "tiny"]
    return [vllm, "serve", model, "--host", "127.0.0.1", "--port", "{port}", *size, *small, *flags]


@pytest.fixture(scope="session")
def adapters(adapter, other_adapter):
    """The flags that serve both, one at a time in a batch."""
    served = [f"extra={adapter}", f"other={other_adapter}"]
    return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "8", "--lora-modules", *served]


@pytest.fixture(scope="session")
def servers(model, adapters, tmp_path_factory):
    """The same server twice, stock and observed, started together."""
    folder = tmp_path_factory.mktemp("servers")
    config = folder / "impala.yaml"
    config.write_text(f"identity:\n  max_traces: {MAX_TRACES}\n")
    features = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"]
    features += adapters
    ours = ["--scheduler", "impala", "--impala-mode", "observe", "--impala-config", str(config)]
    stock = Server("stock", command(model, *features), folder / "stock.log", ENVIRONMENT)
    observed = Server("observed", command(model, *features, *ours), folder / "observed.log", ENVIRONMENT)
    try:
        stock.start()
        observed.start()
        for server in (stock, observed):
            server.wait_ready(READY_S)
        yield Client(stock.url), Client(observed.url)
    finally:
        observed.stop()
        stock.stop()


@pytest.fixture
def stock(servers):
    return servers[0]


@pytest.fixture
def observed(servers):
    return servers[1]


@pytest.fixture
def salt():
    """Keeps a test's traces apart from all others."""
    return uuid.uuid4().hex
