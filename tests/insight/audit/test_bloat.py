"""What prompts carry without need."""

import base64
import json
import struct
from typing import Any

import pytest

from impala_vllm.insight.audit import images
from impala_vllm.insight.audit.bloat import Bloat
from tests.insight.audit.logs import report_of, session

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR"


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    """One request of user messages."""
    return {"session_id": "s", "messages": [{"role": "user", "content": c} for c in contents], **fields}


def wastes(tmp_path, *requests: dict[str, Any]) -> dict[Bloat, tuple[int, int]]:
    return {w.kind: (w.number, w.num_bytes) for w in report_of(tmp_path, list(requests)).wastes()}


def picture(width: int, height: int) -> dict[str, Any]:
    data = base64.b64encode(PNG + struct.pack(">II", width, height) + b"\x08\x02").decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_a_session_that_wastes_nothing_has_no_bloat_but_its_idle_tools(tmp_path):
    found = wastes(tmp_path, *session(4))
    assert set(found) == {Bloat.IDLE_TOOLS}
    assert found[Bloat.IDLE_TOOLS][0] == 2


def test_a_long_message_that_stands_twice_counts_once(tmp_path):
    text = "The whole file, line by line. " * 20
    first = chat(text, "and?")
    assert wastes(tmp_path, first, chat(text, "and?", text)) == {Bloat.REPEATED: (1, len(text))}
    assert wastes(tmp_path, chat("yes", "and?", "yes")) == {}


def test_an_answer_caught_in_a_loop_is_told_from_a_long_one(tmp_path):
    line = "I will now look at the file again, and then again.\n"
    number, size = wastes(tmp_path, chat(line * 60))[Bloat.LOOPED]
    assert number == 1
    assert size == pytest.approx(59 * len(line), rel=0.05)
    assert wastes(tmp_path, chat("".join(f"{i}: {line}" for i in range(60)))) == {}


def test_images_count_by_their_size_and_only_large_ones_are_bloat(tmp_path):
    report = report_of(tmp_path, [chat([picture(280, 280)]), chat([picture(280, 280)], [picture(8000, 4000)])])
    assert (report.carried.images, report.carried.image_tokens) == (2, 100 + images.MAX_TOKENS)
    assert [(w.kind, w.number) for w in report.wastes()] == [(Bloat.LARGE_IMAGES, 1)]


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "data:image/png;base64,####", "data:image/png;base64,", "data:image/bmp;base64,QUJD"],
)
def test_an_image_that_cannot_be_read_counts_as_one_of_no_known_size(url):
    image = images.read(json.dumps({"type": "image_url", "image_url": {"url": url}}))
    assert (image.pixels, image.tokens, image.is_too_large) == (None, images.UNKNOWN_TOKENS, False)


def test_the_size_of_an_image_is_read_from_its_header():
    headers = {
        "png": PNG + struct.pack(">II", 640, 480),
        "gif": b"GIF89a" + struct.pack("<HH", 640, 480),
        "jpeg": b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08"
        + struct.pack(">HH", 480, 640)
        + b"\x03\x01\x22\x00\x02",
        "webp": b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little"),
    }
    for name, data in headers.items():
        part = json.dumps({"url": f"data:image/{name};base64,{base64.b64encode(data).decode()}"})
        assert images.read(part).pixels == 640 * 480, name


def test_a_schema_in_words_is_bloat_where_json_came_of_it_and_no_format_was_asked_for(tmp_path):
    asking = 'Answer in JSON like this: {"city": string, "nights": number}. Nothing else.'
    fitting = chat(asking, output='{"city": "Paris", "nights": 2}')
    assert wastes(tmp_path, fitting)[Bloat.PROSE_SCHEMA][0] == 1
    assert wastes(tmp_path, {**fitting, "output": "I would rather not."}) == {}
    assert wastes(tmp_path, {**fitting, "response_format": {"type": "json_object"}}) == {}


def test_sections_of_a_system_prompt_add_up(tmp_path):
    text = "You help.\n" * 20 + "# Policy\n" + "Never refund. " * 30 + "\n<tools>\n" + "Call one at a time. " * 30
    request = {"session_id": "s", "messages": [{"role": "system", "content": text}, {"role": "user", "content": "hi"}]}
    (system,) = report_of(tmp_path, [request, {**request, "session_id": "t"}]).carried.systems.by_weight()
    assert system.requests == 2
    assert [s.title for s in system.sections()] == ["You help.", "# Policy", "<tools>"]
    assert sum(s.num_bytes for s in system.sections()) == system.num_bytes == len(text)
