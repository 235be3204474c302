"""Asks the teachers: every study's image with Appendix B's prompt, through OpenAI-compatible chat endpoints.

reads   studies.jsonl (trajectories may be there already: those are not asked for again), endpoints.json
writes  OUT.answers.jsonl   one line per (study, teacher), appended as the answers come; nothing is ever rewritten
        OUT                 studies.jsonl with the trajectories put in, whole or not at all

    python tools/collect.py studies.jsonl --endpoints endpoints.json --images files --out with_teachers.jsonl --dry_run
    python tools/collect.py studies.jsonl --endpoints endpoints.json --images files --out with_teachers.jsonl --budget 50 --i_have_permission

endpoint.read_endpoints gives the format of endpoints.json. Rows of OUT.answers.jsonl have a status:

    answered   text, returned model, finish_reason, usage, cost in USD
    refused    the same, but empty or not finished with 'stop': kept, not used, not asked again (unless --ask_refused_again)
    failed     no answer, with the reason; asked again by the next call
    lost       an attempt whose answer did not arrive but may be billed; its cost is what it can have cost at most

The same command goes on where it stopped. Ctrl-C or SIGTERM: what is in flight is finished and written, a second one ends at once.
Exit status 0 if every pair is answered or refused, else 1.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from runtime import endpoint as endpoints  # noqa: E402
from runtime.records import atomic, line_of  # noqa: E402

IN_A_ROW = 10  # so many failed requests, and a teacher is not asked any more


class Stopped(Exception):
    """Asked to stop, out of budget, or the teacher is closed: the request is not made."""


# ------------------------------------------------------------------------------------- the teachers

class Teacher:
    """An endpoint, its prices and its turn-taking."""

    def __init__(self, name, endpoint, spec):
        self.name, self.endpoint = name, endpoint
        self.concurrency = spec.get("concurrency", 4)
        self.interval = 60 / spec["requests_per_minute"] if "requests_per_minute" in spec else 0  # seconds
        self.price = spec.get("usd_per_million_tokens")
        self.image_tokens = spec.get("image_tokens")
        self.most_out = endpoint.fields.get("max_completion_tokens") or endpoint.fields.get("max_tokens")
        self.most_in, self.counted = 0, False  # the largest prompt that the server has counted; whether it ever answered
        self.in_flight, self.in_a_row, self.closed = 0, 0, None
        self.next, self.lock = 0.0, threading.Lock()

    def cost(self, tokens):
        """USD, None where a price or a number is unknown."""
        return (tokens[0] * self.price["in"] + tokens[1] * self.price["out"]) / 1e6 if self.price and tokens[1] is not None else None

    def at_most(self, prompt, sizes):
        """(tokens in, out) of a request, estimated from above; out is None where nothing bounds it."""
        images = sum(self.image_tokens or math.ceil(width * height / 750) for width, height in sizes)
        return max(self.most_in, math.ceil(len(prompt.encode()) / 3) + images), self.most_out

    def learn(self, usage):
        """Takes note of what the server counted. Returns the (tokens in, out), or None."""
        tokens = endpoints.count(usage)
        self.counted, self.most_in = True, max(self.most_in, tokens[0] if tokens else 0)
        return tokens

    def rest(self, until, stop):
        while (left := until - time.monotonic()) > 0:
            if stop.is_set() or self.closed:
                raise Stopped
            stop.wait(min(left, 0.5))

    def take_turn(self, failure, wait, stop):
        """Waits: after 429 with Retry-After everyone who asks this teacher, else who failed; then for the requests per minute."""
        if failure and failure.wait is not None:
            with self.lock:
                self.next = max(self.next, time.monotonic() + wait)
        else:
            self.rest(time.monotonic() + wait, stop)
        with self.lock:
            at = max(time.monotonic(), self.next)
            self.next = at + self.interval
        self.rest(at, stop)
        if stop.is_set() or self.closed:
            raise Stopped


class Purse:
    """What is spent, and what the requests in flight can cost at most. Without a budget it only counts."""

    def __init__(self, spent, budget):
        self.spent, self.budget, self.reserved, self.in_flight = spent, budget, 0.0, 0
        self.change = threading.Condition()

    def wait(self, teacher, at_most, stop):
        """Waits until a request's bound is free; returns that, (tokens, USD). Closes the teacher if it will not be free. A teacher's first
        request goes alone: it tells what an image costs."""
        with self.change:
            while True:
                tokens = at_most()  # it may have grown meanwhile
                cost = teacher.cost(tokens) or 0.0
                fits = self.budget is None or self.spent + self.reserved + cost <= self.budget
                if fits and (self.budget is None or teacher.counted or not teacher.in_flight):
                    return tokens, cost
                if not fits and not self.in_flight:
                    teacher.closed = teacher.closed or f"the budget is reached: {self.spent:.4f} of {self.budget:g} USD are spent"
                if stop.is_set() or teacher.closed:
                    raise Stopped
                self.change.wait(0.5)

    def reserve(self, teacher, at_most, stop):
        with self.change:
            tokens, cost = self.wait(teacher, at_most, stop)
            self.reserved += cost
            self.in_flight += 1
            teacher.in_flight += 1
            return tokens, cost

    def settle(self, teacher, reserved, cost):
        with self.change:
            self.in_flight -= 1
            teacher.in_flight -= 1
            self.reserved = self.reserved - reserved if self.in_flight else 0.0
            self.spent += cost
            self.change.notify_all()


# -------------------------------------------------------------------------------------- the answers

def read_answers(path):
    """The rows of an OUT.answers.jsonl. Raises ValueError naming file and line."""
    rows = []
    for line, row in data.read_jsonl(path):
        if not all(isinstance(row.get(key), str) for key in ("id", "teacher", "status", *(["text"] * (row.get("status") == "answered")))):
            raise ValueError(f'{path}:{line}: expected "id", "teacher", "status" and, if answered, "text"')
        rows.append(row)
    return rows


class Answers:
    """OUT.answers.jsonl: locked, its torn end repaired, read, appended to. A line is there whole or not at all."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            raise ValueError(f"{self.path}: another run writes it; wait for it or choose another --out") from None
        content = self.path.read_bytes()
        if torn := content[content.rfind(b"\n") + 1:]:
            try:
                json.loads(torn)
                os.write(self.file, b"\n")  # only its end is missing
            except ValueError:
                os.ftruncate(self.file, len(content) - len(torn))
                print(f"{self.path}: the last line was torn and is removed; what it held is asked again", file=sys.stderr)
        self.rows = read_answers(self.path)

    def write(self, row):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.lock:
            before, written = os.fstat(self.file).st_size, 0
            try:
                while written < len(line):
                    written += os.write(self.file, line[written:])
            except OSError:
                os.ftruncate(self.file, before)
                raise
            self.rows.append(row)

    def close(self):
        os.fsync(self.file)
        os.close(self.file)


def merge(path, records, rows, names):
    """Writes the records with the answers among their trajectories, whole or not at all. Returns how many answers stand there now."""
    answers, count = {}, 0
    for row in rows:
        if row["status"] == "answered":
            answers.setdefault(row["id"], {})[row["teacher"]] = row["text"]
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for record in records:
            new, old = answers.get(record["id"], {}), record.get("trajectories", {})
            merged = {**old, **{name: new[name] for name in names if name in new and name not in old}}
            count += len(merged) - len(old)
            file.write(line_of({**record, "trajectories": merged} if merged or "trajectories" in record else record))
    return count


# ------------------------------------------------------------------------------------------- asking

@functools.lru_cache(maxsize=256)  # the teachers walk the studies side by side
def image_part(path, root, max_pixels):
    """-> (part of a message, (width, height)): a JPEG of at most max_pixels."""
    image = data.load_image(path, root)
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return endpoints.image_part(image), image.size


def question(study, task, args):
    """-> (messages, prompt, sizes of the images)."""
    prompt = data.student_prompt(study, task, "teacher")
    images = [image_part(path, args.images, args.max_pixels) for path in study.images]
    content = [*(part for part, _ in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}], prompt, [size for _, size in images]


def ask(teacher, study, task, args, purse, write, stop):
    """Asks one teacher about one study, writes the row, returns its status. Raises Stopped, and Failure where the endpoint is of no use."""
    row = {"id": study.id, "teacher": teacher.name}
    messages, prompt, sizes = question(study, task, args)
    at_most = lambda: teacher.at_most(prompt, sizes)
    most, reserved = (0, 0), 0.0  # of the attempt in flight: tokens, USD

    def before(failure, wait):
        nonlocal most, reserved
        if failure:
            fail(failure)
        purse.wait(teacher, at_most, stop)  # before the turn, or those who waited here would all go at once
        teacher.take_turn(failure, wait, stop)
        most, reserved = purse.reserve(teacher, at_most, stop)

    def settle(tokens):
        cost = teacher.cost(tokens)
        purse.settle(teacher, reserved, cost or 0.0)
        return cost

    def fail(failure):
        cost = settle(most if failure.lost else (0, 0))
        if failure.lost:
            write({**row, "status": "lost", "reason": str(failure), "cost": cost})

    try:
        answer = endpoints.ask(teacher.endpoint, messages, f"{args.seed} {study.id} {teacher.name}", args.attempts, before)
    except endpoints.Failure as failure:
        fail(failure)
        if failure.kind == "stop":
            raise
        write({**row, "status": "failed", "reason": str(failure), "cost": 0.0})
        return "failed"
    tokens = teacher.learn(answer.usage)
    reason = f"finish_reason is {answer.finish!r}" if answer.finish != "stop" else "empty" if not answer.text.strip() else None
    row |= {"status": "refused", "reason": reason} if reason else {"status": "answered"}
    write({**row, "text": answer.text, "model": answer.model, "finish_reason": answer.finish, "usage": answer.usage,
           "cost": settle(tokens or most)})
    return row["status"]


def work(teacher, todo, bar, errors, task, args, purse, answers, stop):
    """One thread of one teacher: takes the next study until there is none."""
    try:
        while not (stop.is_set() or teacher.closed):
            with teacher.lock:
                study = next(todo, None)
            if study is None:
                return
            try:
                status = ask(teacher, study, task, args, purse, answers.write, stop)
            except endpoints.Failure as failure:
                teacher.closed = teacher.closed or str(failure)
                return
            except ValueError as error:  # an image that cannot be read
                answers.write({"id": study.id, "teacher": teacher.name, "status": "failed", "reason": str(error), "cost": 0.0})
                continue
            with teacher.lock:
                teacher.in_a_row = teacher.in_a_row + 1 if status == "failed" else 0
                if teacher.in_a_row >= IN_A_ROW:
                    teacher.closed = teacher.closed or f"{IN_A_ROW} requests in a row failed; the reasons are in {answers.path}"
                bar.update(status != "failed")
                bar.set_postfix(usd=f"{purse.spent:.4f}", refresh=False)
    except Stopped:
        pass
    except BaseException as error:  # a full disk, say: all end, and run raises it
        errors.append(error)
        stop.set()


def collect(teachers, todo, chosen, task, args, purse, answers):
    """Asks until nothing is left or a signal comes. Returns the signal's number, or 0."""
    stop, caught, errors = threading.Event(), [], []

    def asked_to_stop(number, _):
        caught.append(number)
        stop.set()
        for name, handler in before.items():
            signal.signal(name, handler)
        print(f"\nfinishing {purse.in_flight} requests in flight; once more to end at once", file=sys.stderr)

    before = {number: signal.signal(number, asked_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bars, threads = [], []
    try:
        for i, teacher in enumerate(teachers):
            mine = todo[teacher.name]
            bars.append(tqdm(total=len(chosen), initial=len(chosen) - len(mine), desc=teacher.name, position=i, unit="study"))
            left = iter(mine)
            for _ in range(min(teacher.concurrency, len(mine))):
                threads.append(threading.Thread(target=work, args=(teacher, left, bars[-1], errors, task, args, purse, answers, stop), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for bar in bars:
            bar.close()
    if errors:
        raise errors[0]
    return caught[0] if caught else 0


# -------------------------------------------------------------------------------------- the command

def parse(argv=None):
    parser = argparse.ArgumentParser(description="Ask the teachers (Appendix B) through OpenAI-compatible chat endpoints.")
    parser.add_argument("studies", help="studies.jsonl")
    parser.add_argument("--endpoints", required=True, help="endpoints.json; endpoint.read_endpoints explains it")
    parser.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument("--out", required=True, help="studies with trajectories; the answers go to OUT.answers.jsonl")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--split", help="ask about the studies of this split only (default: all)")
    parser.add_argument("--teachers", help="NAME,...: ask only these (default: all of endpoints.json)")
    parser.add_argument("--limit", type=int, help="ask about the first N studies only (default: all)")
    parser.add_argument("--budget", type=float, help="USD over all calls with this --out; stops before it is exceeded (default: none)")
    parser.add_argument("--attempts", type=int, default=6, help="per request and call (default: %(default)s)")
    parser.add_argument("--max_pixels", type=int, default=1024 * 28 * 28, help="pixels per image, larger ones are shrunk (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the waiting times (default: %(default)s)")
    parser.add_argument("--ask_refused_again", action="store_true", help="also the pairs whose answer was empty or cut")
    parser.add_argument("--i_have_permission", action="store_true", help="send images to other machines than this one; see docs/data.md on MIMIC-CXR")
    parser.add_argument("--dry_run", action="store_true", help="print one request, the hosts, estimated tokens and cost; ask nobody, write nothing")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser.parse_args(argv)


def dry_run(teachers, todo, task, args):
    """Prints one request, the hosts that would get images and, per teacher, {"requests", "tokens_in", "tokens_out", "usd"}, estimated from at
    most 64 studies. tokens_out and usd are upper bounds, None if nothing bounds them."""
    if first := next((teacher for teacher in teachers if todo[teacher.name]), None):
        body = json.dumps(endpoints.request(first.endpoint, question(todo[first.name][0], task, args)[0]), indent=2, ensure_ascii=False)
        print(f"{first.name}: POST {first.endpoint.url}/chat/completions")
        print(re.sub(r"(data:image/\w+;base64,.{16})[A-Za-z0-9+/=]*", lambda found: f"{found[1]}... ({len(found[0])} characters)", body))
    hosts = dict.fromkeys(urlsplit(teacher.endpoint.url).hostname for teacher in teachers if todo[teacher.name])
    where = [f"{host} ({'this machine' if endpoints.is_loopback(host) else 'not this machine: needs --i_have_permission'})" for host in hosts]
    print(f"images would go to {', '.join(where) or 'nobody'}")
    sums = {}
    for teacher in teachers:
        mine = todo[teacher.name]
        some = [teacher.at_most(*question(study, task, args)[1:])[0] for study in mine[::max(1, len(mine) // 64)]]
        tokens = round(sum(some) / max(1, len(some)) * len(mine)), teacher.most_out and teacher.most_out * len(mine)
        sums[teacher.name] = {"requests": len(mine), "tokens_in": tokens[0], "tokens_out": tokens[1], "usd": teacher.cost(tokens)}
        print(f"{teacher.name}: {json.dumps(sums[teacher.name])}")
    if args.json:
        print(json.dumps({"teachers": sums}))
    return 0


def run(args):
    """Returns the exit status."""
    for name in ("attempts", "limit", "max_pixels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1")
    task = data.load_task(args.task_file)
    specs = endpoints.read_endpoints(args.endpoints, args.teachers, not (args.i_have_permission or args.dry_run), not args.dry_run)
    teachers = [Teacher(name, *spec) for name, spec in specs.items()]
    unbounded = [teacher.name for teacher in teachers if not (teacher.price and teacher.most_out)]
    if args.budget is not None and unbounded:
        raise ValueError(f'--budget: expected "usd_per_million_tokens" and a max_tokens or max_completion_tokens in "request" of {unbounded[0]}')
    studies = data.read_studies(args.studies, task)
    chosen = [study for study in studies if args.split is None or study.split in (None, args.split)][:args.limit]
    missing = [path for study in chosen for path in study.images if not data.image_path(path, args.images).is_file()]
    if missing:
        raise ValueError(f"{args.images}: {len(missing)} images are missing, the first is {missing[0]}{data.folder_twice_hint(missing[0], args.images)}")

    out, path = Path(args.out), Path(f"{args.out}.answers.jsonl")
    if out.exists() and not path.exists() and out.resolve() != Path(args.studies).resolve() and not args.dry_run:
        raise ValueError(f"{out}: exists and was not written by this command, expected another --out")
    if args.dry_run:  # reads what is there without claiming or repairing it
        rows = read_answers(path) if path.exists() else []
    else:
        answers = Answers(path)
        rows = answers.rows
    final = {(row["id"], row["teacher"]) for row in rows if row["status"] == "answered" or row["status"] == "refused" and not args.ask_refused_again}
    have = lambda study, name: name in study.trajectories or (study.id, name) in final
    todo = {teacher.name: [study for study in chosen if not have(study, teacher.name)] for teacher in teachers}
    if args.dry_run:
        return dry_run(teachers, todo, task, args)

    for teacher in teachers:
        for row in rows:
            if row["teacher"] == teacher.name and "usage" in row:
                teacher.learn(row["usage"])
    purse = Purse(sum(row.get("cost") or 0.0 for row in rows), args.budget)
    try:
        caught = collect(teachers, todo, chosen, task, args, purse, answers)
        put_in = merge(out, [study.record for study in studies], rows, [teacher.name for teacher in teachers])
    finally:
        answers.close()

    status = {}
    for row in rows:  # the last word on a pair; an answer is never asked again
        status[row["id"], row["teacher"]] = row
    summary = {}
    for teacher in teachers:
        name = teacher.name
        last = ["answered" if name in study.trajectories else status.get((study.id, name), {}).get("status") for study in chosen]
        counts = {"answered": last.count("answered"), "refused": last.count("refused")}
        counts["open"] = len(chosen) - sum(counts.values())
        summary[name] = {**counts, "models": sorted({row["model"] for row in rows if row["teacher"] == name and row.get("model")})}
        print(f"{name}: {counts['answered']} answered, {counts['refused']} refused (empty or cut), {counts['open']} open"
              + (f"; not asked any more: {teacher.closed}" if teacher.closed else ""))
    print(f"{out}: {put_in} answers put into {len(studies)} studies; {purse.spent:.4f} USD spent as far as prices are known")
    if args.json:
        print(json.dumps({"teachers": summary, "usd": purse.spent}))
    return 128 + caught if caught else int(any(counts["open"] for counts in summary.values()))


def main():
    args = parse()
    try:
        status = run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"collect: {error}") from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
