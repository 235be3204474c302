"""Asks the teachers: every study's image with Appendix B's prompt, through OpenAI-compatible chat
endpoints.

reads   studies.jsonl (trajectories may be there already: those are not asked for again) and
        endpoints.json, whose format runtime/endpoint.py gives (read_endpoints)
writes  OUT.answers.jsonl   one line per (study, teacher), appended as the answers come; nothing is
                            ever rewritten
        OUT                 studies.jsonl with the trajectories put in, whole or not at all

    python tools/collect.py studies.jsonl --endpoints endpoints.json --images files \\
        --out with_teachers.jsonl --dry_run
    python tools/collect.py studies.jsonl --endpoints endpoints.json --images files \\
        --out with_teachers.jsonl --budget 50 --i_have_permission

A row of OUT.answers.jsonl has "id", "teacher", "status" and, by its status,

    answered   "text", "model" (the one that is returned), "finish_reason", "usage", "cost" in USD
    refused    the same and "reason": empty, only thinking, or not finished with 'stop'. It is kept,
               not used, and not asked again (unless --ask_refused_again)
    failed     "reason", "cost": no answer; asked again by the next call
    lost       "reason", "cost": an attempt whose answer did not arrive but may be billed; the cost
               is what it can have been at most

"text" is the answer. Where a teacher also wrote down what it thought, as between <think> and
</think>, or marks around its answer, the row keeps all that came in "content" (data.answer_of).

The same command goes on where it stopped. Ctrl-C or SIGTERM: what is in flight is finished and
written, a second one ends at once. Exit status 0 if every pair is answered or refused, else 1.
"""

import argparse
import contextlib
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import data  # noqa: E402
from runtime import endpoint as endpoints  # noqa: E402
from runtime.records import atomic, line_of, read_jsonl  # noqa: E402

IN_A_ROW = 10  # so many failed requests, and a teacher is not asked any more


class Stopped(Exception):
    """Asked to stop, out of budget, or the teacher is closed: the request is not made."""


# ------------------------------------------------------------------------------------ the teachers

class Teacher:
    """An endpoint, its prices, and whose turn it is.

    name      of the teacher
    endpoint  runtime.endpoint.Endpoint
    entry     of endpoints.json
    `closed` says why it is not asked any more; None while it is asked.
    """

    def __init__(self, name, endpoint, entry):
        self.name, self.endpoint = name, endpoint
        self.concurrency = entry.get("concurrency", 4)
        self.interval = 0  # seconds from one request to the next
        if "requests_per_minute" in entry:
            self.interval = 60 / entry["requests_per_minute"]
        self.price = entry.get("usd_per_million_tokens")
        self.image_tokens = entry.get("image_tokens")
        fields = endpoint.fields
        self.most_out = fields.get("max_completion_tokens") or fields.get("max_tokens")
        self.most_in = 0      # the largest prompt that the server has counted
        self.counted = False  # whether it ever answered
        self.in_flight, self.in_a_row, self.closed = 0, 0, None
        self.next, self.lock = 0.0, threading.Lock()

    def cost(self, tokens):
        """USD of (tokens in, tokens out); None where a price or a number is unknown."""
        tokens_in, tokens_out = tokens
        if not self.price or tokens_out is None:
            return None
        return (tokens_in * self.price["in"] + tokens_out * self.price["out"]) / 1e6

    def at_most(self, prompt, sizes):
        """What a request takes, estimated from above.

        prompt  its text
        sizes   (width, height) of each image in pixels
        Returns (tokens in, tokens out); the latter is None where nothing bounds it.
        """
        images = sum(self.image_tokens or math.ceil(width * height / 750)
                     for width, height in sizes)
        estimate = math.ceil(len(prompt.encode()) / 3) + images
        return max(self.most_in, estimate), self.most_out

    def learn(self, usage):
        """Takes note of the `usage` that the server counted. Returns (tokens in, tokens out), or
        None where it does not tell."""
        tokens = endpoints.count(usage)
        tokens_in, _ = tokens or (0, 0)
        self.counted, self.most_in = True, max(self.most_in, tokens_in)
        return tokens

    def rest(self, until, stop):
        """Waits until a time of time.monotonic. Raises Stopped where it may not be asked then."""
        while (left := until - time.monotonic()) > 0:
            if stop.is_set() or self.closed:
                raise Stopped
            stop.wait(min(left, 0.5))

    def take_turn(self, failure, wait, stop):
        """Waits until the next request may be made.

        failure  endpoint.Failure of the attempt before; None for a first attempt
        wait     seconds: after a 429 with Retry-After everyone who asks this teacher waits, else
                 only who failed; then the requests per minute are kept
        stop     threading.Event
        Raises Stopped.
        """
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
    """What is spent, and what the requests in flight can cost at most.

    spent   USD
    budget  USD; None: there is none, and the purse only counts
    """

    def __init__(self, spent, budget):
        self.spent, self.budget, self.reserved, self.in_flight = spent, budget, 0.0, 0
        self.change = threading.Condition()

    def wait(self, teacher, at_most, stop):
        """Waits until a request's bound is free.

        teacher  Teacher, which is closed if the bound will never be free
        at_most  at_most() returns the bound, (tokens in, tokens out), which may grow meanwhile
        stop     threading.Event
        Returns (the bound in tokens, in USD). Raises Stopped. A teacher's first request goes alone:
        it tells what an image costs.
        """
        with self.change:
            while True:
                tokens = at_most()
                cost = teacher.cost(tokens) or 0.0
                fits = self.budget is None or self.spent + self.reserved + cost <= self.budget
                alone = self.budget is None or teacher.counted or not teacher.in_flight
                if fits and alone:
                    return tokens, cost
                if not fits and not self.in_flight:
                    teacher.closed = teacher.closed or (
                        f"the budget is reached: {self.spent:.4f} of {self.budget:g} USD are spent")
                if stop.is_set() or teacher.closed:
                    raise Stopped
                self.change.wait(0.5)

    def reserve(self, teacher, at_most, stop):
        """`wait`, and then keeps the bound for this request; takes and returns the same."""
        with self.change:
            tokens, cost = self.wait(teacher, at_most, stop)
            self.reserved += cost
            self.in_flight += 1
            teacher.in_flight += 1
            return tokens, cost

    def settle(self, teacher, reserved, cost):
        """Frees what was reserved for a request, in USD, and counts what it cost."""
        with self.change:
            self.in_flight -= 1
            teacher.in_flight -= 1
            self.reserved = self.reserved - reserved if self.in_flight else 0.0
            self.spent += cost
            self.change.notify_all()


# ------------------------------------------------------------------------------------- the answers

def read_answers(path):
    """The rows of an OUT.answers.jsonl. Raises ValueError naming file and line."""
    rows = []
    for line, row in read_jsonl(path):
        keys = ["id", "teacher", "status"] + ["text"] * (row.get("status") == "answered")
        if not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(f'{path}:{line}: expected "id", "teacher", "status" and, if answered, '
                             '"text"')
        rows.append(row)
    return rows


class Answers:
    """OUT.answers.jsonl: locked, its torn end repaired, read, appended to.

    path  the file, in which a line is there whole or not at all
    `rows` are the rows that are in it. Raises ValueError where another run holds it, or a line is
    faulty.
    """

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # the kernel unlocks it however the process ends
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another run writes it; wait for it or choose another "
                             "--out") from None
        self._repair()
        self.rows = read_answers(self.path)

    def _repair(self):
        """Removes a last line that a kill tore, or ends it where only its end is missing."""
        content = self.path.read_bytes()
        torn = content[content.rfind(b"\n") + 1:]
        if not torn:
            return
        try:
            json.loads(torn)
            os.write(self.file, b"\n")
        except ValueError:
            os.ftruncate(self.file, len(content) - len(torn))
            print(f"{self.path}: the last line was torn and is removed; what it held is asked "
                  "again", file=sys.stderr)

    def write(self, row):
        """Appends a row. Raises OSError where it cannot, and leaves nothing of it then."""
        line = line_of(row)
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
        """Waits until all of it is on the disk, and unlocks it."""
        os.fsync(self.file)
        os.close(self.file)


def merge(path, records, rows, names):
    """Writes the records with the answers among their trajectories, whole or not at all.

    path     the file
    records  of studies.jsonl
    rows     of OUT.answers.jsonl
    names    teachers whose answers are put in; a trajectory that a record has already stays
    Returns how many answers were put in.
    """
    answers, count = {}, 0
    for row in rows:
        if row["status"] == "answered":
            answers.setdefault(row["id"], {})[row["teacher"]] = row["text"]
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for record in records:
            old, of_study = record.get("trajectories", {}), answers.get(record["id"], {})
            new = {name: of_study[name] for name in names if name in of_study and name not in old}
            count += len(new)
            if old or new or "trajectories" in record:
                record = {**record, "trajectories": {**old, **new}}
            file.write(line_of(record))
    return count


# ------------------------------------------------------------------------------------------ asking

@functools.lru_cache(maxsize=256)  # the teachers walk the studies side by side
def image_part(path, root, max_pixels):
    """An image as a JPEG.

    path        as a record gives it
    root        the folder of the images
    max_pixels  to which it is shrunk
    Returns (part of a message, (width, height)).
    """
    with data.DECODERS:  # of the requests in flight, few hold a whole film
        image = data.load_image(path, root)
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return endpoints.image_part(image), image.size


def question(study, task, args):
    """What is asked about a study: (messages, the prompt in them, [(width, height) of an image]).

    study  data.Study
    task   data.Task
    args   the flags: images, max_pixels
    """
    prompt = data.student_prompt(study, task, "teacher")
    images = [image_part(path, args.images, args.max_pixels) for path in study.images]
    content = [*(part for part, _ in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}], prompt, [size for _, size in images]


class Attempts:
    """The attempts of one request: each waits for its turn and is paid for.

    teacher  Teacher
    at_most  at_most() returns what an attempt takes at most, (tokens in, tokens out)
    purse    Purse
    lost     lost(failure, cost) is called for an attempt whose answer did not arrive
    stop     threading.Event
    """

    def __init__(self, teacher, at_most, purse, lost, stop):
        self.teacher, self.at_most, self.purse = teacher, at_most, purse
        self.lost, self.stop = lost, stop
        self.most, self.reserved = (0, 0), 0.0  # of the attempt in flight: tokens, USD

    def before(self, failure, wait):
        """What endpoint.ask calls before each attempt. Raises Stopped."""
        if failure:
            self.fail(failure)
        # before the turn, else all who wait for money would then go at once
        self.purse.wait(self.teacher, self.at_most, self.stop)
        self.teacher.take_turn(failure, wait, self.stop)
        self.most, self.reserved = self.purse.reserve(self.teacher, self.at_most, self.stop)

    def settle(self, tokens):
        """Pays for an attempt that took (tokens in, tokens out). Returns USD, None if unknown."""
        cost = self.teacher.cost(tokens)
        self.purse.settle(self.teacher, self.reserved, cost or 0.0)
        return cost

    def fail(self, failure):
        """Pays for an attempt that failed."""
        cost = self.settle(self.most if failure.lost else (0, 0))
        if failure.lost:
            self.lost(failure, cost)


def ask(teacher, study, task, args, purse, write, stop):
    """Asks one teacher about one study and writes the row.

    teacher  Teacher
    study    data.Study
    task     data.Task
    args     the flags of `parse`
    purse    Purse
    write    write(row) appends to OUT.answers.jsonl
    stop     threading.Event
    Returns the row's status. Raises Stopped, and Failure where the endpoint is of no use.
    """
    row = {"id": study.id, "teacher": teacher.name}
    messages, prompt, sizes = question(study, task, args)
    attempts = Attempts(
        teacher, lambda: teacher.at_most(prompt, sizes), purse,
        lambda failure, cost: write({**row, "status": "lost", "reason": str(failure),
                                     "cost": cost}),
        stop)
    jitter = f"{args.seed} {study.id} {teacher.name}"
    try:
        answer = endpoints.ask(teacher.endpoint, messages, jitter, args.attempts, attempts.before)
    except endpoints.Failure as failure:
        attempts.fail(failure)
        if failure.kind == "stop":
            raise
        write({**row, "status": "failed", "reason": str(failure), "cost": 0.0})
        return "failed"
    tokens = teacher.learn(answer.usage)
    row |= judged(answer)
    write({**row, "model": answer.model, "finish_reason": answer.finish, "usage": answer.usage,
           "cost": attempts.settle(tokens or attempts.most)})
    return row["status"]


def judged(answer):
    """What a row says of an answer that arrived: "status", "reason" if it is refused, "text", and
    "content" where what came is not the text alone.

    answer  endpoint.Answer
    """
    text = data.answer_of(answer.text)
    if answer.finish != "stop":
        row = {"status": "refused", "reason": f"finish_reason is {answer.finish!r}", "text": text}
    elif not text.strip():
        reason = "only thinking" if answer.text.strip() else "empty"
        row = {"status": "refused", "reason": reason, "text": text}
    else:
        row = {"status": "answered", "text": text}
    return row if text == answer.text else {**row, "content": answer.text}


def work(teacher, todo, bar, errors, task, args, purse, answers, stop):
    """What a thread of a teacher does: it takes the next study until there is none.

    teacher  Teacher
    todo     iterator of data.Study, shared by the teacher's threads
    bar      the teacher's progress bar
    errors   list that takes what must end the command, such as a full disk
    task     data.Task
    args     the flags of `parse`
    purse    Purse
    answers  Answers
    stop     threading.Event
    """
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
                answers.write({"id": study.id, "teacher": teacher.name, "status": "failed",
                               "reason": str(error), "cost": 0.0})
                continue
            with teacher.lock:
                teacher.in_a_row = teacher.in_a_row + 1 if status == "failed" else 0
                if teacher.in_a_row >= IN_A_ROW:
                    teacher.closed = teacher.closed or (
                        f"{IN_A_ROW} requests in a row failed; the reasons are in {answers.path}")
                bar.update(status != "failed")
                bar.set_postfix(usd=f"{purse.spent:.4f}", refresh=False)
    except Stopped:
        pass
    except BaseException as error:  # all threads end, and `collect` raises it
        errors.append(error)
        stop.set()


def collect(teachers, todo, chosen, task, args, purse, answers):
    """Asks until nothing is left or a signal comes.

    teachers  [Teacher]
    todo      {teacher: [data.Study] that it is asked about}
    chosen    [data.Study] that have to be answered
    task      data.Task
    args      the flags of `parse`
    purse     Purse
    answers   Answers
    Returns the signal's number, or 0. Raises what a thread could not go on after.
    """
    stop, caught, errors = threading.Event(), [], []

    def asked_to_stop(number, _):
        """Stops the threads; a second signal does what it did before."""
        caught.append(number)
        stop.set()
        for name, handler in handlers.items():
            signal.signal(name, handler)
        print(f"\nfinishing {purse.in_flight} requests in flight; once more to end at once",
              file=sys.stderr)

    handlers = {number: signal.signal(number, asked_to_stop)
                for number in (signal.SIGINT, signal.SIGTERM)}
    bars, threads = [], []
    try:
        for i, teacher in enumerate(teachers):
            mine = todo[teacher.name]
            bars.append(tqdm(total=len(chosen), initial=len(chosen) - len(mine), desc=teacher.name,
                             position=i, unit="study"))
            arguments = (teacher, iter(mine), bars[-1], errors, task, args, purse, answers, stop)
            for _ in range(min(teacher.concurrency, len(mine))):
                threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for bar in bars:
            bar.close()
    if errors:
        raise errors[0]
    return caught[0] if caught else 0


# ------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line."""
    parser = argparse.ArgumentParser(
        description="Ask the teachers (Appendix B) through OpenAI-compatible chat endpoints.")
    parser.add_argument(
        "studies",
        help="studies.jsonl")
    parser.add_argument(
        "--endpoints", required=True,
        help="endpoints.json; endpoint.read_endpoints explains it")
    parser.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument(
        "--out", required=True,
        help="studies with trajectories; the answers go to OUT.answers.jsonl")
    parser.add_argument(
        "--task_file",
        help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument(
        "--split",
        help="ask about the studies of this split only (default: all)")
    parser.add_argument(
        "--teachers",
        help="NAME,...: ask only these (default: all of endpoints.json)")
    parser.add_argument(
        "--limit", type=int,
        help="ask about the first N studies only (default: all)")
    parser.add_argument(
        "--budget", type=float,
        help="USD over all calls with this --out; stops before it is exceeded (default: none)")
    parser.add_argument(
        "--attempts", type=int, default=6,
        help="per request and call (default: %(default)s)")
    parser.add_argument(
        "--max_pixels", type=int, default=1024 * 28 * 28,
        help="pixels per image, larger ones are shrunk (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the waiting times (default: %(default)s)")
    add_switches(parser)
    args = parser.parse_args(argv)
    if args.budget is not None and not 0 < args.budget < math.inf:
        parser.error(f"--budget {args.budget}: expected a number above 0")
    return args


def add_switches(parser):
    """Adds the flags that are given or not."""
    parser.add_argument(
        "--ask_refused_again", action="store_true",
        help="also the pairs whose answer was empty or cut")
    parser.add_argument(
        "--i_have_permission", action="store_true",
        help="send images to other machines than this one; see docs/data.md on MIMIC-CXR")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print one request, the hosts, estimated tokens and cost; ask nobody, write nothing")
    parser.add_argument(
        "--json", action="store_true",
        help="end with one JSON object")


def dry_run(teachers, todo, task, args):
    """Prints one request, the hosts that would get images and, per teacher, {"requests",
    "tokens_in", "tokens_out", "usd"}, estimated from at most 64 studies.

    teachers  [Teacher]
    todo      {teacher: [data.Study] that it would be asked about}
    task      data.Task
    args      the flags of `parse`
    tokens_out and usd are upper bounds, None if nothing bounds them.
    """
    asked = [teacher for teacher in teachers if todo[teacher.name]]
    if asked:
        first = asked[0]
        messages, _, _ = question(todo[first.name][0], task, args)
        body = json.dumps(endpoints.request(first.endpoint, messages), indent=2,
                          ensure_ascii=False)
        print(f"{first.name}: POST {first.endpoint.url}/chat/completions")
        print(re.sub(r"(data:image/\w+;base64,.{16})[A-Za-z0-9+/=]*",
                     lambda found: f"{found[1]}... ({len(found[0])} characters)", body))
    where = []
    for host in dict.fromkeys(urlsplit(teacher.endpoint.url).hostname for teacher in asked):
        other = "not this machine: needs --i_have_permission"
        where.append(f"{host} ({'this machine' if endpoints.is_loopback(host) else other})")
    print(f"images would go to {', '.join(where) or 'nobody'}")
    sums = {}
    for teacher in teachers:
        sums[teacher.name] = estimate(teacher, todo[teacher.name], task, args)
        print(f"{teacher.name}: {json.dumps(sums[teacher.name])}")
    if args.json:
        print(json.dumps({"teachers": sums}))


def estimate(teacher, studies, task, args):
    """What a teacher would take for some studies; see `dry_run`.

    teacher  Teacher
    studies  [data.Study]
    task     data.Task
    args     the flags of `parse`
    """
    tokens_in = []
    for study in studies[::max(1, len(studies) // 64)]:
        _, prompt, sizes = question(study, task, args)
        of_study, _ = teacher.at_most(prompt, sizes)
        tokens_in.append(of_study)
    all_in = round(sum(tokens_in) / max(1, len(tokens_in)) * len(studies))
    all_out = teacher.most_out and teacher.most_out * len(studies)
    return {"requests": len(studies), "tokens_in": all_in, "tokens_out": all_out,
            "usd": teacher.cost((all_in, all_out))}


def require_bounds(teachers):
    """Raises ValueError where nothing bounds the cost of a teacher's request, which --budget needs.
    """
    unbounded = [teacher.name for teacher in teachers if not (teacher.price and teacher.most_out)]
    if unbounded:
        raise ValueError('--budget: expected "usd_per_million_tokens" and a max_tokens or '
                         f'max_completion_tokens in "request" of {unbounded[0]}')


def require_films(studies, root):
    """Raises ValueError where an image of the studies is missing below the folder `root`."""
    missing = [path for study in studies for path in study.images
               if not data.image_path(path, root).is_file()]
    if missing:
        first = missing[0]
        raise ValueError(f"{root}: {len(missing)} images are missing, the first is {first}"
                         f"{data.folder_twice_hint(first, root)}")


def unanswered(teachers, chosen, rows, args):
    """Whom to ask about what.

    teachers  [Teacher]
    chosen    [data.Study]
    rows      of OUT.answers.jsonl
    args      the flags of `parse`: ask_refused_again
    Returns {teacher: [data.Study]}.
    """
    final = ("answered",) if args.ask_refused_again else ("answered", "refused")
    pairs = {(row["id"], row["teacher"]) for row in rows if row["status"] in final}
    return {teacher.name: [study for study in chosen
                           if teacher.name not in study.trajectories
                           and (study.id, teacher.name) not in pairs]
            for teacher in teachers}


def summarise(teachers, chosen, rows):
    """Prints of each teacher how many pairs are answered, refused and open.

    teachers  [Teacher]
    chosen    [data.Study]
    rows      of OUT.answers.jsonl
    Returns {teacher: {"answered", "refused", "open", "models"}}.
    """
    # the last row of a pair counts; an answer is never asked again
    status = {(row["id"], row["teacher"]): row["status"] for row in rows}
    summary = {}
    for teacher in teachers:
        name = teacher.name
        last = ["answered" if name in study.trajectories else status.get((study.id, name))
                for study in chosen]
        counts = {"answered": last.count("answered"), "refused": last.count("refused")}
        counts["open"] = len(chosen) - sum(counts.values())
        models = {row["model"] for row in rows if row["teacher"] == name and row.get("model")}
        summary[name] = {**counts, "models": sorted(models)}
        closed = f"; not asked any more: {teacher.closed}" if teacher.closed else ""
        print(f"{name}: {counts['answered']} answered, {counts['refused']} refused (empty or cut), "
              f"{counts['open']} open{closed}")
    return summary


def run(args):
    """Asks, or with --dry_run prints what would be asked.

    args  the flags of `parse`
    Returns the exit status. Raises ValueError or OSError where an input is faulty or the answers
    cannot be written.
    """
    for name in ("attempts", "limit", "max_pixels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1")
    task = data.load_task(args.task_file)
    entries = endpoints.read_endpoints(
        args.endpoints, args.teachers,
        only_loopback=not (args.i_have_permission or args.dry_run), with_keys=not args.dry_run)
    teachers = [Teacher(name, *entry) for name, entry in entries.items()]
    if args.budget is not None:
        require_bounds(teachers)
    studies = data.read_studies(args.studies, task)
    chosen = [study for study in studies
              if args.split is None or study.split in (None, args.split)][:args.limit]
    require_films(chosen, args.images)

    out, path = Path(args.out), Path(f"{args.out}.answers.jsonl")
    if args.dry_run:  # reads what is there without claiming or repairing it
        rows = read_answers(path) if path.exists() else []
        dry_run(teachers, unanswered(teachers, chosen, rows, args), task, args)
        return 0
    if out.exists() and not path.exists() and out.resolve() != Path(args.studies).resolve():
        raise ValueError(f"{out}: exists and was not written by this command, expected another "
                         "--out")
    with contextlib.closing(Answers(path)) as answers:
        rows = answers.rows
        todo = unanswered(teachers, chosen, rows, args)
        for teacher in teachers:
            for row in rows:
                if row["teacher"] == teacher.name and "usage" in row:
                    teacher.learn(row["usage"])
        purse = Purse(sum(row.get("cost") or 0.0 for row in rows), args.budget)
        caught = collect(teachers, todo, chosen, task, args, purse, answers)
        put_in = merge(out, [study.record for study in studies], rows, list(todo))

    summary = summarise(teachers, chosen, rows)
    print(f"{out}: {put_in} answers put into {len(studies)} studies; {purse.spent:.4f} USD spent "
          "as far as prices are known")
    if args.json:
        print(json.dumps({"teachers": summary, "usd": purse.spent}))
    if caught:
        return 128 + caught
    return int(any(counts["open"] for counts in summary.values()))


def main():
    """Runs the command."""
    args = parse()
    try:
        status = run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"collect: {error}") from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
