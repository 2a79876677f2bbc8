"""A tokenizer with a chat template, without weights."""

import pytest


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from impala_vllm.replay.tiny_model import _tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from impala_vllm.fleet.hashing.tokenizer import Tokenizer

    return Tokenizer(str(model_dir))
