"""
A work queue: a share group gives each job to one worker, and unfinished jobs are sent again.

Run it with a development broker:  python examples/work_queue.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import sys

import anyio
from anyio.abc import TaskStatus

from emitter_anyio import ChannelKey, connect
from emitter_anyio.testing import ConfiguredBroker

JOBS, DONE, GROUP = "work/jobs/", "work/done/", "workers"


async def work(
    name: str,
    url: str,
    key: ChannelKey,
    group_key: ChannelKey,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    async with (
        connect(url, username=name) as emitter,
        emitter.subscribe(group_key, JOBS, group=GROUP) as jobs,
    ):
        task_status.started()
        async for job in jobs:
            number = job.as_object()
            if name == "carl":
                print(f"carl quits without doing job {number}", flush=True)
                return
            done = {"job": number, "result": number**2, "worker": name}
            await emitter.publish(key, DONE, done, qos=1)


async def main() -> None:
    async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
        key = await emitter.keygen(broker.secret_key, "work/#/", "rw")
        # A share group needs a key for the group and its channel together.
        group_key = await emitter.keygen(broker.secret_key, f"$share/{GROUP}/{JOBS}", "r")
        open_jobs = set(range(1, 13))
        async with (
            emitter.subscribe(key, DONE, last=0) as results,
            anyio.create_task_group() as workers,
        ):
            for name in ("ann", "ben", "carl"):
                await workers.start(work, name, broker.url, key, group_key)
            while open_jobs:
                # The broker delivers each job once and does not store it. Send the open jobs again
                # if no result arrives for a while: a job can be done twice, but is never lost.
                for number in sorted(open_jobs):
                    await emitter.publish(key, JOBS, number, qos=1)
                while open_jobs:
                    with anyio.move_on_after(1.5) as timeout:
                        done = (await results.receive()).as_object()
                    if timeout.cancelled_caught:
                        break
                    if done["job"] in open_jobs:
                        open_jobs.remove(done["job"])
                        print(
                            f"job {done['job']}: {done['result']} (by {done['worker']})", flush=True
                        )
            workers.cancel_scope.cancel()


if __name__ == "__main__":
    backend = "trio" if "trio" in sys.argv else "asyncio"
    # By default, Trio raises KeyboardInterrupt in any line of any task.
    options = {"restrict_keyboard_interrupt_to_checkpoints": True} if backend == "trio" else {}
    try:
        anyio.run(main, backend=backend, backend_options=options)
    except* KeyboardInterrupt:
        pass  # Ctrl-C: all connections are closed
