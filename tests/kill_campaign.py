"""Kill a run again and again until it ends, and compare what it leaves with what an uninterrupted run leaves.

    python tests/kill_campaign.py --kills 1000 --seed 0 --jobs 1

One process imports TensorFlow once and forks a child for every life of a run. A life ends at a moment that is drawn:
while a file is written, renamed or forced to disk, between training steps, during a validation, or after a time; by
SIGKILL or by a signal that asks to stop. Between two lives a file may be damaged. A chain is a run killed until it
ends. Its last checkpoint and average have to be the uninterrupted run's to the byte, and so have the rows of
metrics.csv (timing columns apart) and of validation.csv. A chain is drawn from its seed and its number: `--chain 17`
repeats one, life by life.

TensorFlow computes step by step here, without graphs, and images come from Python's reader: a life then takes a
second. `--graph` leaves both as users have them.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from itertools import chain
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np  # noqa: E402
import tiny  # noqa: E402
from images import noise_folders  # noqa: E402

from effnet_repro import checkpoint, config, runs, training  # noqa: E402
from effnet_repro.runs import recorder, watch  # noqa: E402
from effnet_repro.runs.recorder import TIMING  # noqa: E402
from effnet_repro.training import runtime, stream  # noqa: E402

KINDS = ("write", "rename", "renamed", "fsync", "delete", "step", "validate", "time")
SIGNALS = (signal.SIGKILL,) * 5 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DAMAGES = (
    "cut the newest checkpoint",
    "flip a byte of the newest checkpoint",
    "delete the average",
    "damage the average",
    "cut metrics.csv",
    "empty metrics.csv",
    "fill metrics.csv with bytes",
    "delete metrics.csv",
    "cut validation.csv",
)
OPTIONS = {
    **tiny.SMOKE,
    "max_steps": 9,
    "epochs": 3,
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "validate_every": 1,
}
CASE = config.override(tiny.TINY, net_stages=tiny.STAGES[:1])
FINISHED, STOPPED, INTERRUPTED, FAILED = 0, 10, 11, 12  # How a life says that it ended


# ---------------------------------------------------------------- one life


class Moment:
    """Ends this process when the `number`-th event of a `kind` comes; a stop may be asked for twice."""

    def __init__(self, kind, number, how, twice):
        self.kind, self.number, self.how, self.twice, self.seen = (
            kind,
            number,
            how,
            twice,
            Counter(),
        )

    def __call__(self, kind, before_kill=None):
        self.seen[kind] += 1
        if kind != self.kind or self.seen[kind] not in (self.number, self.number + self.twice):
            return
        if before_kill is not None:
            before_kill()
        os.kill(os.getpid(), self.how)

    def watch(self):
        """Let the library tell of its events."""
        write, replace, fsync = checkpoint._write, os.replace, os.fsync
        unlink, count, check = Path.unlink, recorder.Recorder.count, runs.StopSignals.check

        def watched_write(path, data):
            half = lambda: Path(path).write_bytes(data[: len(data) * self.number % (len(data) + 1)])
            self("write", half if self.how == signal.SIGKILL else None)
            write(path, data)

        def watched_replace(*names):
            self("rename")
            replace(*names)
            self("renamed")

        def watched_unlink(path, *more, **how):
            if path.suffix == ".safetensors":
                self("delete")
            return unlink(path, *more, **how)

        checkpoint._write, os.replace, Path.unlink = watched_write, watched_replace, watched_unlink
        os.fsync = lambda file: (self("fsync"), fsync(file))[1]
        recorder.Recorder.count = lambda *values: (self("step"), count(*values))[1]
        runs.StopSignals.check = lambda stop: (self("validate"), check(stop))[1]


def live(run_dir, data_dir, log, moment):
    """Train until the end or until the moment comes; never returns."""
    status = FAILED
    try:
        out = os.open(str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        moment.watch()
        run = training.train(CASE, data_dir, run_dir, **OPTIONS)
        status = FINISHED if run.finished else STOPPED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork(run_dir, data_dir, log, moment, seconds=None):
    """Run one life; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        live(run_dir, data_dir, log, moment)
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, moment.how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- between two lives


def damage(run_dir, kind, draw):
    """Damage a file of a run; returns whether there was one that a run can do without."""
    folder = Path(run_dir) / "checkpoints"
    if "checkpoint" in kind:
        whole = [p for p in checkpoint.find_checkpoints(folder)[0] if is_whole(p)]
        if len(whole) < 2:
            return False
        path = whole[-1]
    elif "average" in kind:
        path = folder / "average.safetensors"
    else:
        path = Path(run_dir) / kind.split()[1 if kind.split()[1].endswith("csv") else -1]
        path = path if path.suffix else Path(run_dir) / "metrics.csv"
    if not path.exists() or not path.stat().st_size:
        return False
    whole = bytearray(path.read_bytes())
    if kind.startswith("delete"):
        path.unlink()
    elif kind.startswith("cut"):
        path.write_bytes(whole[: -draw.randint(1, min(len(whole), 60))])
    elif kind.startswith("empty"):
        path.write_bytes(b"")
    elif kind.startswith("fill"):
        path.write_bytes(draw.randbytes(200))
    else:
        whole[-draw.randint(1, len(whole) // 2)] ^= 1 << draw.randrange(8)
        path.write_bytes(whole)
    return True


def is_whole(path):
    """Return whether a checkpoint can be read to its end: a flipped byte shows only there."""
    try:
        checkpoint.load(path)
    except checkpoint.DamagedFile:
        return False
    return True


def left_behind(run_dir):
    """What has to be the same in every run: bytes of weights and average, and rows without their timing."""
    folder = Path(run_dir) / "checkpoints"
    found = {p.name: p.read_bytes() for p in checkpoint.find_checkpoints(folder)[0][-1:]}
    found["average"] = (folder / "average.safetensors").read_bytes()
    for name in ("metrics.csv", "validation.csv"):
        text = (Path(run_dir) / name).read_bytes().decode()
        rows = csv.DictReader(io.StringIO(text, newline=""))
        found[name] = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
        found[f"columns of {name}"] = rows.fieldnames
    found["other files"] = sorted(
        p.name for p in Path(run_dir).rglob("*") if p.suffix not in (".safetensors", ".csv")
    )
    return found


# ---------------------------------------------------------------- chains


class Campaign:
    """An uninterrupted run, and chains that are compared with it."""

    def __init__(self, folder, seed, graph=False):
        self.folder, self.seed = Path(folder), seed
        self.data_dir = noise_folders(self.folder / "data")
        prepare(graph)
        begun, run_dir = time.monotonic(), self.folder / "whole"
        counts = self.folder / "counts.json"
        child = os.fork()
        if child == 0:
            moment = Moment(None, 0, 0, 0)
            os._exit = lambda status, leave=os._exit: (
                counts.write_text(json.dumps(moment.seen)),
                leave(status),
            )
            live(run_dir, self.data_dir, self.folder / "whole.log", moment)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == FINISHED, (self.folder / "whole.log").read_text()
        self.seconds = time.monotonic() - begun
        self.counts, self.whole = json.loads(counts.read_text()), left_behind(run_dir)

    def draw(self, chance):
        """Draw how a life ends: (moment, seconds or None)."""
        kind = chance.choice(KINDS)
        how = chance.choice(SIGNALS)
        twice = chance.choice((0, 0, 1, 2)) if how != signal.SIGKILL else 0
        if kind == "time":
            return Moment(None, 0, how, 0), self.seconds * chance.random() ** 2
        until = max(1, round(self.counts[kind] * chance.random()))  # early: more kills a chain
        return Moment(kind, chance.randint(1, until), how, twice), None

    def chain(self, number, say=lambda text: None):
        """Kill a run until it ends; returns (what happened how often, differences)."""
        chance = random.Random(f"{self.seed}/{number}")
        run_dir, log = self.folder / f"chain-{number}", self.folder / f"chain-{number}.log"
        happened = Counter()
        for life in range(60):
            moment, seconds = self.draw(chance)
            status = fork(run_dir, self.data_dir, log, moment, seconds)
            what = f"{moment.kind or 'time'} {signal.Signals(moment.how).name}"
            say(f"chain {number}, life {life}: {what} {moment.number} {seconds or ''}: {status}")
            if status == FAILED:
                return happened, [f"life {life} failed, see {log}: {log.read_text()[-2000:]}"]
            if status == FINISHED:
                break
            happened[what] += 1
            if chance.random() < 0.2:
                kind = chance.choice(DAMAGES)
                happened[kind] += damage(run_dir, kind, chance)
                say(f"chain {number}: {kind}")
        else:
            return happened, ["60 lives were not enough"]
        found = left_behind(run_dir)
        wrong = [k for k in {**self.whole, **found} if found.get(k) != self.whole.get(k)]
        if not wrong:
            shutil.rmtree(run_dir)
        return happened, [explain(k, self.whole.get(k), found.get(k)) for k in wrong]


def explain(name, whole, found):
    """Say what differs, in short."""
    if isinstance(whole, bytes) or isinstance(found, bytes):
        return f"{name}: other bytes"
    return f"{name}: {found} in place of {whole}"


def prepare(graph):
    """Make a life short: a network of one block, and nothing beside what is compared."""
    training.configure()
    tiny.shrink()
    runtime.say_estimate = lambda *_: None
    runtime.environment = lambda: {}
    watch.Events.write = lambda *_: None
    if graph:
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)  # starts no threads: a fork is still safe
    budgets = config.read_yaml()
    stream._tensors = lambda make, args, how, more=(): make(*args, reader="numpy", **how)
    stream._tf_updates = lambda *a: streamed(tf, *a)
    config.read_yaml = lambda path=None: budgets


def streamed(tf, images, controls, first):
    """What `training.updates` makes of images and of what is drawn, without the tracing of its functions."""

    def steps():
        for step, (pixels, labels) in enumerate(images, first):
            yield {"images": pixels, "labels": labels, **controls(step)}

    stream = steps()
    one = next(stream)
    signature = {k: tf.TensorSpec(np.shape(v), np.asarray(v).dtype) for k, v in one.items()}
    return tf.data.Dataset.from_generator(lambda: chain([one], stream), output_signature=signature)


def work(campaign, kills, job, jobs, results, until=float("inf")):
    """Do every `jobs`-th chain until this job has its share of the kills, or until a time."""
    number, done = job, 0
    while done < kills / jobs and time.monotonic() < until:
        happened, wrong = campaign.chain(number)
        done += sum(v for k, v in happened.items() if k not in DAMAGES)
        with open(results, "a") as file:
            file.write(json.dumps([number, happened, wrong]) + "\n")
        number += jobs


def run_campaign(folder, kills, seed, jobs=1, graph=False, minutes=None):
    """Do chains until there were `kills` kills; returns (what happened how often, chains, differences)."""
    campaign, children = Campaign(folder, seed, graph), []
    until = time.monotonic() + 60 * (minutes or float("inf"))
    for job in range(jobs):
        child = os.fork()
        if child == 0:
            try:
                work(campaign, kills, job, jobs, Path(folder) / f"job-{job}.jsonl", until)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    happened, chains, wrong = Counter(), 0, [f"a job ended with {s}" for s in ended if s]
    for path in sorted(Path(folder).glob("job-*.jsonl")):
        for number, one, differences in map(json.loads, path.read_text().splitlines()):
            happened.update(one)
            chains += 1
            wrong += [f"chain {number}: {text}" for text in differences]
    return happened, chains, wrong


def write_result(args, happened, chains, wrong, seconds):
    """Write the campaign as a row of kills.csv."""
    from effnet_repro import results
    from effnet_repro.training import device_name

    total = lambda take: sum(v for k, v in happened.items() if take(k))
    kills = total(lambda k: k not in DAMAGES)
    row = {"what": "as users train" if args.graph else "step by step", "kills": kills}
    row.update(chains=chains, chains_that_differ=wrong, damaged_files=total(lambda k: k in DAMAGES))
    at = lambda kind: total(lambda k: k not in DAMAGES and k.split()[0] == kind)
    row.update({f"at_{kind}": at(kind) for kind in KINDS})
    row["by_sigkill"] = total(lambda k: k.endswith("SIGKILL"))
    row["seconds"] = round(seconds)
    about = results.origin(device_name(), ["python", *sys.argv], args.seed, kills)
    results.write_rows(Path(args.results) / "kills.csv", [row], ("what", "seed"), about)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="chains at a time")
    parser.add_argument("--minutes", type=float, help="begin no chain after so many")
    parser.add_argument("--chain", type=int, help="only this one, life by life")
    parser.add_argument("--graph", action="store_true", help="as users train: slower")
    parser.add_argument("--folder", help="where runs go and stay; default: a temporary one")
    parser.add_argument("--results", help="folder of results: write a row there")
    args = parser.parse_args()
    folder, begun = Path(args.folder or tempfile.mkdtemp(prefix="kills-")), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if args.chain is not None:
        happened, wrong = Campaign(folder, args.seed, args.graph).chain(args.chain, print)
        chains = 1
    else:
        how = (args.kills, args.seed, args.jobs, args.graph, args.minutes)
        happened, chains, wrong = run_campaign(folder, *how)
    kills = sum(v for k, v in happened.items() if k not in DAMAGES)
    for what, times in sorted(happened.items()):
        print(f"{times:6} {what}")
    print(
        f"{kills} kills in {chains} chains, {time.monotonic() - begun:.0f} s; {len(wrong)} differ; {folder}"
    )
    print("\n".join(wrong))
    if args.results:
        write_result(args, happened, chains, len(wrong), time.monotonic() - begun)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
