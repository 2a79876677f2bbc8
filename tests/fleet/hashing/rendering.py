"""A chat as vLLM itself renders it, from what its API made of a request."""

from types import SimpleNamespace

import pytest


def rendered(tokenizer, request, messages, tools, template: str) -> str:
    """The text in front of vLLM's tokenizer."""
    hf = pytest.importorskip("vllm.renderers.hf")
    from vllm.renderers.chat_utils import parse_chat_messages

    config = SimpleNamespace(multimodal_config=None, is_multimodal_model=False, enable_prompt_embeds=False)
    params = request.build_chat_params(template, "auto")
    conversation, _, _ = parse_chat_messages(
        messages,
        config,  # type: ignore[arg-type]
        hf._detect_content_format(template, default="string"),
    )
    return hf.safe_apply_chat_template(
        config, tokenizer._whole, conversation, tools=tools, chat_template=template, tokenize=False,
        **{k: v for k, v in params.chat_template_kwargs.items() if k != "documents"},
    )  # fmt: skip
