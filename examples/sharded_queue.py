"""
A work queue over several processes: each process does the jobs of one shard.

In a cluster, a share group can deliver a job to two workers. Here, a hash of the customer selects
a shard, so that one process does all jobs of this customer, in order. The broker stores the jobs,
and each worker saves its position, so that a worker that was killed continues where it stopped.

Run it with a development broker:  python examples/sharded_queue.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. The program prints
each result with the number of the process that computed it, kills one of the processes, and starts
it again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4
from zlib import crc32

import anyio

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import ConfiguredBroker

SHARDS = 3
JOBS = [(customer, number) for number in range(1, 5) for customer in ("ann", "ben", "carl", "dora")]
KILL_AFTER = "dora", 2


def shard_of(customer: str) -> int:
    """Return the same number in every process, unlike Python's ``hash()``."""
    return crc32(customer.encode()) % SHARDS


def load(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def save(file: Path, cursor: str) -> None:
    new = file.with_suffix(".new")  # the old file stays complete if the worker is killed here
    new.write_text(cursor)
    new.replace(file)


async def work(queue: str, shard: str, file: Path) -> None:
    """Do the jobs of a shard, in a separate process."""
    url, key = os.environ["EMITTER_URL"], os.environ["EMITTER_KEY"]
    async with (
        connect(url) as emitter,
        emitter.consume(key, f"{queue}jobs/{shard}/", after=load(file)) as jobs,
    ):
        async for stored in jobs:
            job = stored.as_object()
            await anyio.sleep(0.05)  # stands for work
            done = {**job, "result": job["number"] ** 2, "worker": os.getpid()}
            await emitter.publish(key, f"{queue}done/", done, qos=1)
            # A worker that is killed before this line does the job a second time.
            save(file, jobs.cursor)


async def keep_running(command: list[str], environment: dict[str, str]) -> None:
    while True:
        # A separate session, so that Ctrl-C reaches only the main process.
        ended = await anyio.run_process(
            command, stdout=None, stderr=None, env=environment, start_new_session=True, check=False
        )
        print(f"a worker ended with {ended.returncode}; starting it again", flush=True)


async def publish_jobs(emitter: Emitter, key: ChannelKey, queue: str) -> None:
    for customer, number in JOBS:
        job = {"customer": customer, "number": number}
        await emitter.publish(key, f"{queue}jobs/{shard_of(customer)}/", job, ttl=3600, qos=1)


async def main(backend: str = "asyncio") -> None:
    queue = f"queue/{uuid4().hex}/"  # a new one for each run, because the broker stores the jobs
    with TemporaryDirectory() as folder:
        async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
            key = await emitter.keygen(broker.secret_key, "queue/#/", "rwsl")
            environment = {**os.environ, "EMITTER_URL": broker.url, "EMITTER_KEY": key.key}
            async with (
                emitter.subscribe(key, f"{queue}done/", last=0) as results,
                anyio.create_task_group() as tasks,
            ):
                for shard in range(SHARDS):
                    arguments = [backend, queue, str(shard), f"{folder}/{shard}"]
                    command = [sys.executable, __file__, *arguments]
                    tasks.start_soon(keep_running, command, environment)
                tasks.start_soon(publish_jobs, emitter, key, queue)
                open_jobs = {*JOBS}
                while open_jobs:
                    done = (await results.receive()).as_object()
                    job = done["customer"], done["number"]
                    if job not in open_jobs:
                        continue  # done a second time
                    open_jobs.remove(job)
                    result = f"{job[0]}, job {job[1]}: {done['result']}"
                    print(f"{result} by process {done['worker']}", flush=True)
                    if job == KILL_AFTER:
                        os.kill(done["worker"], signal.SIGTERM)
                tasks.cancel_scope.cancel()  # kills the workers


if __name__ == "__main__":
    backend, *job = sys.argv[1:] or ["asyncio"]
    # By default, Trio raises KeyboardInterrupt in any line of any task.
    options = {"restrict_keyboard_interrupt_to_checkpoints": True} if backend == "trio" else {}
    try:
        if job:
            anyio.run(work, job[0], job[1], Path(job[2]), backend=backend)
        else:
            anyio.run(main, backend, backend=backend, backend_options=options)
    except* KeyboardInterrupt:
        pass  # Ctrl-C: all connections are closed, and the workers have ended
