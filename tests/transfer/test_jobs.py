"""In which order jobs start, and what a result says of every key."""

from impala_vllm.transfer.jobs import Item, Job, JobQueue


def make(job_id: int, is_write: bool = False, num_items: int = 1) -> Job:
    items = tuple(Item(b"%d-%d" % (job_id, i), i, memoryview(bytearray(8))) for i in range(num_items))
    return Job(job_id, is_write, items, serial=job_id)


def order(queue: JobQueue) -> list[int]:
    """Start everything, one item at a time."""
    found: list[int] = []
    while (job := queue.next_read() or queue.next_write()) is not None:
        job.begin(0.0)
        found.append(job.job_id)
    return found


def test_reads_go_before_writes_and_each_kind_in_its_order():
    queue = JobQueue()
    for job in (make(1, is_write=True), make(2), make(3, is_write=True), make(4)):
        queue.add(job)
    assert order(queue) == [2, 4, 1, 3]


def test_a_read_goes_before_the_rest_of_a_write_under_way():
    queue = JobQueue()
    queue.add(make(1, is_write=True, num_items=3))
    job = queue.next_write()
    assert job is not None
    job.begin(1.0)
    queue.add(make(2))
    assert order(queue) == [2, 1, 1]


def test_a_withdrawn_job_starts_nothing_more():
    queue = JobQueue()
    jobs = [make(1, num_items=2), make(3, is_write=True, num_items=2)]
    for job in jobs:
        queue.add(job)
        job.is_withdrawn = True
    assert order(queue) == []


def test_what_is_left_of_a_job_is_what_has_not_ended():
    job = make(1, num_items=3)
    job.begin(0.0)
    assert job.left_bytes == 24
    job.end(job.items[0], False)
    assert job.left_bytes == 16


def test_every_key_is_in_one_list_of_the_result():
    job = make(7, num_items=4)
    for _ in range(3):
        job.begin(10.0)
    job.end(job.items[1], True)
    job.end(job.items[0], False)
    job.is_withdrawn = True
    job.end(job.items[2], True)
    result = job.result(13.0)
    assert result.done_keys == (b"7-1", b"7-2")
    assert result.failed_keys == (b"7-0",)
    assert result.untried_keys == (b"7-3",)
    assert result.cancelled
    assert (result.num_bytes, result.seconds) == (16, 3.0)


def test_a_job_that_is_given_up_fails_what_was_under_way():
    job = make(7, num_items=3)
    job.begin(0.0)
    job.begin(0.0)
    job.end(job.items[0], True)
    job.is_withdrawn = True
    job.give_up()
    result = job.result(2.0)
    assert (result.done_keys, result.failed_keys, result.untried_keys) == ((b"7-0",), (b"7-1",), (b"7-2",))


def test_a_job_of_nothing_has_a_result_at_once():
    result = make(1, num_items=0).result(5.0)
    assert (result.done_keys, result.failed_keys, result.cancelled, result.seconds) == ((), (), False, 0.0)
