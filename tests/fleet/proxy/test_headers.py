"""Headers on their way through the router."""

from impala_vllm.fleet.proxy.headers import for_client, for_server, with_rank


def test_what_belongs_to_a_connection_stays_there():
    sent = [
        (b"Connection", b"keep-alive, X-Private"),
        (b"connection", b"Other"),
        (b"X-Private", b"1"),
        (b"other", b"2"),
        (b"Keep-Alive", b"timeout=5"),
        (b"X-Kept", b"3"),
    ]
    assert for_server(sent) == [("x-kept", "3")]
    assert for_client(sent) == [(b"x-kept", b"3")]


def test_values_keep_their_bytes():
    name = "né 你".encode()
    (kept,) = for_server([(b"x-name", name), (b"host", b"router"), (b"content-length", b"7")])
    assert kept[1].encode() == name
    assert for_server([(b"x-name", b"n\xe9")]) == [("x-name", "né")]
    assert for_client([(b"x-name", b"n\xe9"), (b"content-length", b"7")]) == [
        (b"x-name", b"n\xe9"),
        (b"content-length", b"7"),
    ]


def test_a_rank_of_the_clients_own_goes_where_the_router_sets_one():
    sent = for_server([(b"X-Data-Parallel-Rank", b"7"), (b"a", b"b")])
    assert with_rank(sent, 1) == [("a", "b"), ("X-data-parallel-rank", "1")]


def test_date_and_server_are_written_by_the_router():
    assert for_client([(b"Date", b"today"), (b"Server", b"uvicorn"), (b"a", b"b")]) == [(b"a", b"b")]
