"""In which order jobs start, and what a result says of every key."""

from impala_vllm.transfer.jobs import Item, Job, JobQueue


def make(job_id: int, is_write: bool = False, not_before_s: float | None = None, num_items: int = 1) -> Job:
    items = tuple(Item(b"%d-%d" % (job_id, i), i, memoryview(bytearray(8))) for i in range(num_items))
    return Job(job_id, is_write, items, not_before_s, submitted_s=0.0, serial=job_id)


def order(queue: JobQueue, now: float) -> list[int]:
    """Start everything that may start, one item at a time."""
    found: list[int] = []
    while (job := queue.next_read(now) or queue.next_write()) is not None:
        job.begin(now)
        found.append(job.job_id)
    return found


def test_waited_for_reads_go_before_due_recalls_before_writes():
    queue = JobQueue()
    for job in (make(1, is_write=True), make(2, not_before_s=5.0), make(3), make(4, not_before_s=3.0), make(5)):
        queue.add(job)
    assert order(queue, now=5.0) == [3, 5, 4, 2, 1]


def test_a_recall_does_not_start_before_its_time():
    queue = JobQueue()
    queue.add(make(1, not_before_s=5.0))
    assert queue.next_read(4.999) is None
    assert queue.next_due_s() == 5.0
    assert order(queue, now=5.0) == [1]
    assert queue.next_due_s() is None


def test_a_hastened_recall_goes_with_the_reads_that_wait():
    queue, recall = JobQueue(), make(1, not_before_s=100.0, num_items=2)
    queue.add(recall)
    queue.add(make(2))
    queue.hasten(recall)
    queue.hasten(recall)
    assert order(queue, now=0.0) == [2, 1, 1]
    assert list(queue.waiting()) == []


def test_a_read_goes_before_the_rest_of_a_job_under_way():
    queue = JobQueue()
    queue.add(make(1, not_before_s=0.0, num_items=3))
    job = queue.next_read(1.0)
    assert job is not None
    job.begin(1.0)
    queue.add(make(2))
    assert order(queue, now=1.0) == [2, 1, 1]


def test_a_withdrawn_job_starts_nothing_more():
    queue = JobQueue()
    jobs = [make(1, num_items=2), make(2, not_before_s=0.0, num_items=2), make(3, is_write=True, num_items=2)]
    for job in jobs:
        queue.add(job)
        job.is_withdrawn = True
    assert order(queue, now=1.0) == []
    assert list(queue.waiting()) == []


def test_every_key_is_in_one_list_of_the_result():
    job = make(7, num_items=4)
    for _ in range(3):
        job.begin(10.0)
    job.end(job.items[1], True, 11.0)
    job.end(job.items[0], False, 12.0)
    job.is_withdrawn = True
    job.end(job.items[2], True, 13.0)
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
    job.end(job.items[0], True, 1.0)
    job.is_withdrawn = True
    job.give_up()
    result = job.result(2.0)
    assert (result.done_keys, result.failed_keys, result.untried_keys) == ((b"7-0",), (b"7-1",), (b"7-2",))


def test_a_job_of_nothing_has_a_result_at_once():
    result = make(1, num_items=0).result(5.0)
    assert (result.done_keys, result.failed_keys, result.cancelled, result.seconds) == ((), (), False, 0.0)
