"""What workers survive, in figures: `python tests/benchmarks/worker_faults.py [workers|ray|learner|ratio]`.

workers  20 `kill -9` of random workers in a run of 2 worker processes
ray      10 `kill -9` of Ray actors in a run of 2
learner  10 `kill -9` of the learner, which resumes each time
ratio    samples per insert asked 4.0, over 2,000 updates, with one slow and one fast worker and a death
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.scaling.lakes import make_buffer, make_env, small_trainer
from torchrl_amago.trainers import read_progress

PAUSE = 4.0  # seconds between two kills


def zombies() -> int:
    states = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            facts = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue
        states.append((facts["State"][0], int(facts["PPid"])))
    return sum(state == "Z" and parent == os.getpid() for state, parent in states)


def heartbeats(run_dir: Path) -> dict[str, dict]:
    found = {}
    for file in (run_dir / "workers").glob("*.json"):
        try:
            found[file.stem] = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
    return found


def kill_workers(run_dir: Path, kills: int = 20, **options) -> None:
    """Kill a random worker every few seconds, as soon as all of them have played."""
    trainer = small_trainer(run_dir, workers=2, total_updates=10**6, capacity=50_000, **options)
    state = {"last": None, "gap": 0.0, "kills": 0, "at": None, "back": []}
    victims = {}

    def callback(t) -> None:
        now = time.monotonic()
        state["gap"] = max(state["gap"], now - (state["last"] or now))
        state["last"] = now
        pids = trainer.collector.pids()
        is_full = len(pids) == 2 and not set(pids) & set(victims)
        if state["at"] is not None and is_full and state["kills"] > len(state["back"]):
            state["back"].append(now - state["at"])
        if is_full and (state["at"] is None or now > state["at"] + PAUSE):
            if state["kills"] == kills:
                t.request_stop()
                return
            victim = random.choice(sorted(pids))
            os.kill(victim, signal.SIGKILL)
            victims[victim] = now
            state["at"], state["kills"] = now, state["kills"] + 1

    trainer.callbacks.append(callback)
    begin = time.monotonic()
    outcome = trainer.train()
    buffer = trainer.online_buffer
    buffer.storage.verify()
    back, rejected = state["back"], trainer.collector.metrics()["workers/rejected_segments"]
    print(
        f"{kills} kill -9 of workers in {time.monotonic() - begin:.0f} s: {outcome}, "
        f"{trainer.counts.updates} updates, {trainer.monitor.trials} trials, all intact; longest "
        f"pause of the learner {state['gap']:.2f} s; back to 2 workers after "
        f"{sum(back) / len(back):.1f} s on average, {max(back):.1f} s at most; "
        f"zombies {zombies()}; segments set aside {rejected:.0f}"
    )


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def learn(run_dir: Path) -> None:
    trainer = small_trainer(run_dir, workers=2, total_updates=10**6, capacity=50_000)
    trainer.resume(missing_ok=True).train()


def kill_learner(run_dir: Path, kills: int = 10) -> None:
    """Kill the learner at a random moment, and compare what is there with what was."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrl_amago.trainers", "tests.scaling.lakes"])
    written, lost, times, latest = 0, 0, [], -1
    for _ in range(kills):
        learner = context.Process(target=learn, args=(run_dir,))
        begin = time.monotonic()
        learner.start()
        while True:
            names = sorted((run_dir / "checkpoints").glob("update_*/manifest.json"))
            newest = int(names[-1].parent.name[7:]) if names else -1
            if newest > latest:
                break
            time.sleep(0.02)
        times.append(time.monotonic() - begin)
        time.sleep(2.0 * random.random())
        os.kill(learner.pid, signal.SIGKILL)
        learner.join()
        time.sleep(0.5)
        buffer = make_buffer(None, path=run_dir / "replay", mode="read")
        lost += buffer.write_count < written
        written, latest = buffer.write_count, newest
        buffer.storage.verify()
    time.sleep(3.0)  # its workers end
    left = [x for x in heartbeats(run_dir).values() if is_running(x["pid"])]
    trainer = small_trainer(run_dir, workers=0, total_updates=10**6, capacity=50_000).resume()
    before = trainer.counts.updates
    trainer.callbacks.append(lambda t: t.counts.updates >= before + 10 and t.request_stop())
    trainer.train()
    same = trainer.counts.frames == trainer.online_buffer.write_count
    print(
        f"{kills} kill -9 of the learner: replay shrank {lost} times, {written} steps at the end, "
        f"all intact; frames counted = steps written: {same}; next checkpoint "
        f"{sum(times) / len(times):.1f} s after a start; workers left over {len(left)}"
    )


def slow_env():
    """One worker of the two is ten times slower."""
    env = make_env()
    if multiprocessing.current_process().name == "worker-0":
        step = env.base_env._step
        env.base_env._step = lambda td: (time.sleep(0.02), step(td))[1]
    return env


def hold_ratio(run_dir: Path, asked: float = 4.0, updates: int = 2000) -> None:
    trainer = small_trainer(
        run_dir, workers=2, make=slow_env, total_updates=updates, samples_per_insert=asked,
        capacity=50_000,
    )  # fmt: skip

    def callback(t) -> None:
        if t.counts.updates == updates // 2:
            os.kill(heartbeats(run_dir)["worker-1"]["pid"], signal.SIGKILL)

    trainer.callbacks.append(callback)
    begin = time.monotonic()
    print(trainer.train(), f"{time.monotonic() - begin:.0f} s")
    table = read_progress(run_dir)
    ratio = table["ratio/samples_per_insert"]
    settled = ratio[table["update"] >= 100]
    print(f"asked {asked}: {ratio[-1]:.3f} at the end, {settled.min():.3f} to {settled.max():.3f}")
    for name in ("wait/learner", "wait/workers", "lag/mean", "lag/p95", "workers/restarted"):
        print(f"  {name}: {table[name][-1]:.3f}")


def main() -> None:
    chosen = sys.argv[1:] or ["workers", "learner", "ratio"]
    for name in chosen:
        run_dir = Path(tempfile.mkdtemp(prefix="faults_"))
        if name == "workers":
            kill_workers(run_dir)
        elif name == "ray":
            kill_workers(run_dir, 10, ray="local")
        elif name == "learner":
            kill_learner(run_dir)
        else:
            hold_ratio(run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
