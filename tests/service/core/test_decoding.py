"""The decoder's processes: order, fairness, limits, replacement."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_core.images import decode
from cifar_core.pixels import ImageLimits, ImageRejected
from service.core import decode_lane, decode_worker
from service.core.decode_messages import Kind, ProcessLimits
from service.core.decoding import Decoder
from service.core.fair_queue import DecodeRequest, Job
from service.errors import DeadlineExpired, Overloaded
from tests.cifar_core.image_corpus import gradient, saved
from tests.conftest import REPOSITORY
from tests.service.core.decoders import LIMITS, cpu_seconds, niceness, running, until
from tests.service.core.hostile_images import noise_png, progressive_jpeg
from tests.service.exports import pictures

SMALL = saved(gradient(48, 32))
# Just below the limit of scans: about a second of CPU time.
EXPENSIVE = progressive_jpeg(5600, 60)
# Nearly the most pixels that the fast lane takes: about 10 ms.
MEDIUM = noise_png(1020)


def test_many_files_are_decoded_in_order_and_a_bad_one_fails_alone():
    async def test():
        pixels = pictures(50)
        files = [saved(Image.fromarray(image)) for image in pixels]
        files[7] = b"not an image"
        async with running() as decoder:
            results = await decoder.decode(files)
        rejection = results.pop(7)
        assert isinstance(rejection, ImageRejected)
        assert not rejection.internal
        assert "it begins with b'not an i'" in str(rejection)
        assert all((result == image).all() for result, image in zip(results, np.delete(pixels, 7, axis=0), strict=True))

    asyncio.run(test())


def test_the_decoder_gives_the_same_pixels_as_the_library_for_files_of_any_size():
    async def test():
        files = [saved(gradient(300, 200), "JPEG"), noise_png(500), noise_png(1300), SMALL]
        async with running() as decoder:
            for file, result in zip(files, await decoder.decode(files), strict=True):
                assert (result == decode(file)).all()
            assert await decoder.decode([]) == []

    asyncio.run(test())


def test_processes_of_the_fast_lane_are_busy_until_their_files_are_decoded():
    async def test():
        async with running() as decoder:
            assert decoder.busy_processes() == 0
            task = asyncio.create_task(decoder.decode([MEDIUM] * 24))
            await until(lambda: decoder.busy_processes() == 2)
            await task
            assert decoder.busy_processes() == 0
            task = asyncio.create_task(decoder.decode([EXPENSIVE]))
            await until(lambda: len(decoder.pids) > 2)  # a process of the slow lane
            assert decoder.busy_processes() == 0
            await task

    asyncio.run(test())


def test_starting_does_not_block_and_files_sent_meanwhile_are_decoded():
    async def test():
        began = time.perf_counter()
        decoder = Decoder(2, LIMITS)
        assert time.perf_counter() - began < 0.05
        assert isinstance((await decoder.decode([SMALL]))[0], np.ndarray)
        decoder.close()

    asyncio.run(test())


def test_files_beyond_the_limits_of_bytes_and_pixels_are_rejected():
    async def test():
        async with running(1, ImageLimits(max_bytes=20_000, max_pixels=10_000)) as decoder:
            large, many = await decoder.decode([bytes(20_001), saved(Image.new("L", (101, 100)))])
        assert "20001 bytes; at most 20000" in str(large)
        assert "101 x 100 = 10100 pixels; at most 10000" in str(many)

    asyncio.run(test())


def test_a_small_request_does_not_wait_for_the_images_of_a_large_one():
    async def test():
        async with running(1) as decoder:
            many = asyncio.create_task(decoder.decode([MEDIUM] * 40))
            await asyncio.sleep(0)
            await decoder.decode([SMALL])
            assert not many.done()
            await many

    asyncio.run(test())


def test_clients_take_turns_whatever_the_number_of_their_requests():
    async def test():
        finished = []

        async def ask(decoder: Decoder, client: str) -> None:
            await decoder.decode([MEDIUM], client=client)
            finished.append(client)

        async with running(1) as decoder:
            busy = [asyncio.create_task(ask(decoder, "busy")) for _ in range(30)]
            await asyncio.sleep(0)
            await ask(decoder, "modest")
            assert finished.count("busy") <= 10  # files that were sent ahead, and its turn
            await asyncio.gather(*busy)

    asyncio.run(test())


def test_a_cancelled_request_decodes_no_further_file():
    async def test():
        async with running(1) as decoder:
            before = cpu_seconds(decoder.pids[0])
            many = asyncio.create_task(decoder.decode([MEDIUM] * 400))
            await asyncio.sleep(0.1)
            many.cancel()
            with pytest.raises(asyncio.CancelledError):
                await many
            await decoder.decode([SMALL])
            assert cpu_seconds(decoder.pids[0]) - before < 1.0  # all 400 files take several seconds

    asyncio.run(test())


def test_files_whose_deadline_has_passed_are_not_decoded():
    async def test():
        async with running(1) as decoder:
            with pytest.raises(DeadlineExpired):
                await decoder.decode([MEDIUM] * 400, deadline=time.monotonic() + 0.1)
            assert isinstance((await decoder.decode([SMALL], deadline=time.monotonic() + 60))[0], np.ndarray)

    asyncio.run(test())


def test_a_file_that_takes_too_much_cpu_time_is_rejected_alone_and_the_error_names_the_limit():
    async def test():
        ended = []
        async with running(1, max_decode_seconds=0.3, on_ended=ended.append) as decoder:
            first, expensive, last = await decoder.decode([SMALL, EXPENSIVE, SMALL])
            assert isinstance(first, np.ndarray)
            assert isinstance(last, np.ndarray)
            assert isinstance(expensive, ImageRejected)
            assert not expensive.internal
            assert "more than 0.3 s of CPU time" in str(expensive)
            assert "--max-decode-seconds" in str(expensive)
            assert ended == ["limit"]
            assert isinstance((await decoder.decode([SMALL]))[0], np.ndarray)

    asyncio.run(test())


def test_if_a_process_is_killed_only_the_file_that_it_was_decoding_fails():
    async def test():
        ended = []
        async with running(1, max_decode_seconds=20, on_ended=ended.append) as decoder:
            (fast,) = decoder.pids
            waiting = asyncio.create_task(decoder.decode([EXPENSIVE] + [SMALL] * 20))
            await until(lambda: len(decoder.pids) == 2)
            slow = next(pid for pid in decoder.pids if pid != fast)
            await until(lambda: cpu_seconds(slow) > 0.1)
            os.kill(slow, signal.SIGSEGV)
            killed, *others = await waiting
            assert isinstance(killed, ImageRejected)
            assert killed.internal
            assert all(isinstance(other, np.ndarray) for other in others)
            assert ended == ["crash"]
            assert isinstance((await decoder.decode([EXPENSIVE]))[0], np.ndarray)

    asyncio.run(test())


def test_processes_killed_at_any_moment_are_replaced_at_once():
    async def test():
        async with running(2) as decoder:
            for _ in range(10):
                waiting = asyncio.create_task(decoder.decode([SMALL] * 100))
                await asyncio.sleep(0.003)
                os.kill(decoder.pids[0], signal.SIGKILL)
                results = await asyncio.wait_for(waiting, 5)
                assert sum(isinstance(result, ImageRejected) for result in results) <= 1
                await until(lambda: len(decoder.pids) == 2, seconds=5)

    asyncio.run(test())


def test_a_stopped_process_is_killed_and_its_files_are_decoded_by_others():
    async def test():
        ended = []
        async with running(1, on_ended=ended.append) as decoder:
            os.kill(decoder.pids[0], signal.SIGSTOP)
            results = await asyncio.wait_for(decoder.decode([SMALL] * 20), 10)
            assert all(isinstance(result, np.ndarray) for result in results)
            assert ended == ["limit"]

    asyncio.run(test())


def test_if_processes_cannot_start_requests_are_refused_with_a_time_to_retry_and_pauses_grow(monkeypatch):
    async def test():
        attempts = []

        def fail(*arguments: object) -> None:
            attempts.append(time.monotonic())
            raise OSError("no process left")

        monkeypatch.setattr(decode_lane, "start_process", fail)
        decoder = Decoder(1, LIMITS)
        with pytest.raises(Overloaded, match="no decode process can be started") as caught:
            await asyncio.wait_for(decoder.decode([SMALL]), 10)
        assert caught.value.retry_after
        assert len(attempts) == 3
        assert attempts[2] - attempts[1] > attempts[1] - attempts[0] > 0.1
        monkeypatch.undo()
        while True:  # it starts after the pause
            try:
                (pixels,) = await decoder.decode([SMALL])
                break
            except Overloaded:
                await asyncio.sleep(0.05)
        assert not isinstance(pixels, ImageRejected)
        decoder.close()

    asyncio.run(test())


def test_expensive_files_run_in_processes_of_lower_priority():
    async def test():
        async with running(1) as decoder:
            await decoder.decode([noise_png(1300)])
            fast, slow = decoder.pids
            own = os.getpriority(os.PRIO_PROCESS, 0)
            assert (niceness(fast) - own, niceness(slow) - own) == (0, 10)

    asyncio.run(test())


def test_a_process_inherits_no_files_of_the_server_and_ignores_signals_from_the_terminal():
    async def test():
        async with running(1) as decoder:
            (pid,) = decoder.pids
            await decoder.decode([SMALL])
            numbers = {int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert len(numbers - {0, 1, 2}) == 1
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
            assert isinstance((await decoder.decode([SMALL]))[0], np.ndarray)
            assert decoder.pids == [pid]

    asyncio.run(test())


def test_closing_the_decoder_ends_its_processes():
    async def test():
        decoder = Decoder(2, LIMITS)
        await decoder.decode([SMALL, noise_png(1300)])
        pids = decoder.pids
        assert len(pids) >= 3
        decoder.close()
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=5)

    asyncio.run(test())


def test_a_bug_in_the_decoder_is_reported_as_such_with_its_traceback(monkeypatch):
    def broken(image: object, *, scalable: bool) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(decode_worker, "pixels_of", broken)
    kind, content = decode_worker.answer(SMALL, 2**30, ProcessLimits(1, 10**8, 2**30, 0), LIMITS)
    assert kind is Kind.FAULT
    assert b"RuntimeError: a bug" in content


def test_processes_that_are_killed_while_they_have_nothing_to_do_cost_no_image():
    async def test():
        async with running(2) as decoder:
            await decoder.decode([SMALL] * 4)
            for _ in range(5):
                for pid in decoder.pids:
                    os.kill(pid, signal.SIGKILL)
                (result,) = await asyncio.wait_for(decoder.decode([SMALL]), 20)
                assert not isinstance(result, ImageRejected), result

    asyncio.run(test())


def test_a_cancelled_request_is_held_by_no_queue():
    async def test():
        async with running(1) as decoder:
            busy = asyncio.create_task(decoder.decode([noise_png(1300)] * 3, client="busy"))
            await asyncio.sleep(0.05)
            data = SMALL + bytes(1000)
            waiting = asyncio.create_task(decoder.decode([noise_png(1300), data], client="waiting"))
            await asyncio.sleep(0.2)
            waiting.cancel()
            await asyncio.wait([waiting])
            queues = [queue for lane in (decoder._fast, decoder._slow) for queue in (lane._queue, lane._large)]
            assert not any("waiting" in queue._clients for queue in queues)
            await busy

    asyncio.run(test())


def test_a_large_file_is_decoded_although_none_came_for_long(monkeypatch):
    monkeypatch.setattr(decode_lane, "_IDLE_SECONDS", 0.2)

    async def test():
        large = noise_png(1300)
        async with running(1) as decoder:
            for _ in range(2):  # before the slow lane's first process, and after its last has ended
                decoder._slow._last_ready -= 60  # as if a minute had passed
                (pixels,) = await decoder.decode([large])
                assert (pixels == decode(large)).all()
                await until(lambda: len(decoder.pids) == 1)

    asyncio.run(test())


def test_processes_start_after_any_number_of_failed_attempts(monkeypatch):
    monkeypatch.setattr(decode_lane, "_MAX_PAUSE_SECONDS", 0.0)

    async def test():
        attempts, start_process = [], decode_lane.start_process

        def fail(*arguments: object) -> object:
            attempts.append(1)
            if len(attempts) > 1100:
                return start_process(*arguments)
            raise OSError("no process left")

        monkeypatch.setattr(decode_lane, "start_process", fail)
        decoder = Decoder(1, LIMITS)
        await until(lambda: any(process.is_ready for process in decoder._fast._processes), seconds=20)
        assert isinstance((await decoder.decode([SMALL]))[0], np.ndarray)
        decoder.close()

    asyncio.run(test())


def test_a_file_that_ends_every_process_at_once_is_given_up():
    async def test():
        ended = []
        async with running(1, on_ended=ended.append) as decoder:

            async def kill() -> None:
                while True:
                    if decoder.busy_processes():
                        for process in decoder._fast._processes:
                            process.kill()
                    await asyncio.sleep(0)

            killing = asyncio.create_task(kill())
            (result,) = await asyncio.wait_for(decoder.decode([MEDIUM]), 20)
            killing.cancel()
            assert isinstance(result, ImageRejected)
            assert result.internal
            assert len(ended) == 4  # it was repeated three times

    asyncio.run(test())


def test_requests_that_wait_when_the_decoder_is_closed_are_refused():
    async def test():
        async with running(1) as decoder:
            waiting = asyncio.create_task(decoder.decode([MEDIUM] * 100))
            await asyncio.sleep(0.02)
            decoder.close()
            with pytest.raises(Overloaded, match="shutting down"):
                await asyncio.wait_for(waiting, 5)

    asyncio.run(test())


def test_the_kernel_limits_what_a_process_may_do():
    async def test():
        async with running(1) as decoder:
            await decoder.decode([noise_png(1300)])  # so there is a process of each lane
            for pid in decoder.pids:
                for limit, value in (
                    (resource.RLIMIT_CORE, 0),
                    (resource.RLIMIT_FSIZE, 0),
                    (resource.RLIMIT_NOFILE, 64),
                ):
                    assert resource.prlimit(pid, limit) == (value, value)
                assert resource.prlimit(pid, resource.RLIMIT_AS)[1] < 2**33
                assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()

    asyncio.run(test())


def test_failed_starts_are_forgotten_once_a_process_has_started(monkeypatch):
    async def test():
        def fail(*arguments: object) -> None:
            raise OSError("no process left")

        monkeypatch.setattr(decode_lane, "start_process", fail)
        decoder = Decoder(1, LIMITS)
        with pytest.raises(Overloaded):
            await asyncio.wait_for(decoder.decode([SMALL]), 10)
        monkeypatch.undo()
        await until(lambda: any(process.is_ready for process in decoder._fast._processes))
        start_process = decode_lane.start_process

        def start_slowly(*arguments: object) -> object:
            time.sleep(0.3)
            return start_process(*arguments)

        monkeypatch.setattr(decode_lane, "start_process", start_slowly)
        os.kill(decoder.pids[0], signal.SIGKILL)
        await until(lambda: not decoder.pids)
        assert isinstance((await decoder.decode([SMALL]))[0], np.ndarray)  # it waits for the next process
        decoder.close()

    asyncio.run(test())


def test_after_a_process_exceeded_a_limit_no_file_waits_behind_another_in_a_process():
    async def test():
        most = 0
        async with running(1) as decoder:
            os.kill(decoder.pids[0], signal.SIGPROF)  # as the kernel does at the limit of CPU time
            await until(lambda: decoder._fast._cautious_until > time.monotonic())
            task = asyncio.create_task(decoder.decode([SMALL] * 50))
            while not task.done():
                most = max([most, *(len(process.jobs) for process in decoder._fast._processes)])
                await asyncio.sleep(0)
        assert most == 1

    asyncio.run(test())


def test_when_memory_runs_out_the_kernel_ends_a_decode_process_before_the_server():
    score = Path("/proc/self/oom_score_adj")
    if not score.exists():
        pytest.skip("this system has no oom_score_adj")
    own = max(int(score.read_text()), 953)  # what Kubernetes gives to a server that requests 5 % of a node's memory
    if own == 1000:
        pytest.skip("this process has the highest score already")
    script = f"""
import asyncio
from pathlib import Path
from tests.service.core.decoders import running

async def main():
    async with running(1) as decoder:
        print(Path(f"/proc/{{decoder.pids[0]}}/oom_score_adj").read_text())

if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("{own}")
    asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > own


class Process:
    """A process of a lane that keeps its jobs until the test removes them.

    Attributes:
        received: The memory of all jobs that it ever got, in order.
    """

    def __init__(self) -> None:
        self.is_ready, self.unanswered_bytes = True, 0
        self.jobs: deque[Job] = deque()
        self.received: list[int] = []

    def send(self, job: Job) -> None:
        self.jobs.append(job)
        self.received.append(job.memory)


def lane_with(processes: list[Process], files_ahead: int) -> decode_lane.Lane:
    """A lane whose files may need 100 bytes; those that need more than 10 bytes share them."""
    options = decode_lane.LaneOptions(
        name="test",
        limits=ProcessLimits(1.0, 2**20, max_memory=100, niceness=0),
        processes=0,  # it starts none of its own
        on_demand=True,
        files_ahead=files_ahead,
        max_seconds=1.0,
        common_memory=10,
    )
    nothing = lambda *_: None  # noqa: E731
    lane = decode_lane.Lane(options, LIMITS, ThreadPoolExecutor(1), nothing, nothing, nothing)
    lane._processes += processes
    return lane


def jobs_of(*memory: int) -> list[Job]:
    """The jobs of one request, which need this much memory."""
    request = DecodeRequest([SMALL] * len(memory), "client", None, asyncio.get_running_loop().create_future())
    return [Job(request, index, size) for index, size in enumerate(memory)]


def test_files_that_need_much_memory_alternate_with_the_others():
    async def test():
        process = Process()
        lane_with([process], files_ahead=8).add(jobs_of(1, 2, 3, 4, 11, 12, 13))
        assert process.received == [11, 1, 12, 2, 13, 3, 4]

    asyncio.run(test())


def test_a_file_that_all_processes_may_decode_at_the_same_time_does_not_count_as_one_of_much_memory():
    async def test():
        process = Process()
        lane_with([process], files_ahead=8).add(jobs_of(10, 10, 11))
        assert process.received == [11, 10, 10]

    asyncio.run(test())


def test_files_that_need_much_memory_wait_until_it_is_free_while_others_pass():
    async def test():
        first, second = Process(), Process()
        lane = lane_with([first, second], files_ahead=8)

        def in_use() -> list[int]:
            return sorted(job.memory for process in (first, second) for job in process.jobs)

        lane.add(jobs_of(10))
        lane.add(jobs_of(60))
        assert [job.memory for job in second.jobs] == [60]
        lane.add(jobs_of(41, 10, 10))  # 60 and 41 together would be more than 100
        assert in_use() == [10, 10, 10, 60]
        lane._on_reply(second.jobs.popleft(), Kind.REJECTED, b"")
        assert in_use() == [10, 10, 10, 41]
        lane.add(jobs_of(59))
        assert in_use() == [10, 10, 10, 41, 59]

    asyncio.run(test())
