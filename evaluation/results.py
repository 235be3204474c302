"""Long work that is on disk as it is done: shared over the ranks, gone on with where it stopped; and a results file, with all that is missing.

    RESULTS.json           {"settings", "rows", "missing", "table", ...}, written whole at the end
    RESULTS.json.parts/    part-RANK.jsonl, [key, value] a line, while the work goes on; the same command goes on from there
"""

import hashlib
import json
import shutil
from pathlib import Path

from tqdm import tqdm

import data
import training
from runtime import checkpoint, ranks
from runtime.records import shown

QUIET = ("json", "strict", "num_workers", "output")  # flags that change no figure


def begin(args, inputs, benches):
    """inputs: files and student folders; benches: datasets.Benchmark with the studies to be asked. -> (what --output holds of this very
    command on these very files, or None; its settings; the folder of its parts, or None without --output)."""
    asked = [[s.id, s.images, s.labels, s.report, [data.image_path(path, bench.images).stat().st_size for path in s.images]]
             for bench in benches for s in bench.studies]
    settings = {key: value for key, value in vars(args).items() if key not in QUIET}
    settings["sha256"] = [*(checkpoint.fingerprint(path) for path in inputs if path), hashlib.sha256(json.dumps(asked).encode()).hexdigest()]
    if not args.output:
        return None, settings, None
    settings = json.loads(json.dumps(settings))
    before = {"settings": None}
    if Path(args.output).exists():
        try:
            before = json.loads(Path(args.output).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict) or "settings" not in before:
            raise ValueError(f"{args.output}: exists and was not written by evaluate.py, expected another --output")
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return before if before["settings"] == settings else None, settings, Path(f"{args.output}.parts") / key


def end(args, results, known=False):
    """Prints the table and what is missing, writes --output, gives the JSON line; with --strict, exits with 1 if anything is missing."""
    missing = results["missing"]
    ranks.say((f"{args.output} holds these results already\n" if known else "") + results["table"])
    if missing:
        more = f"\n  ... and {len(missing) - 20} more" + (f", all of them in {args.output}" if args.output else "") if len(missing) > 20 else ""
        ranks.say(f"missing, left out: {len(missing)}\n  " + "\n  ".join(map(shown, missing[:20])) + more)
    if args.output and not known:
        ranks.on_rank_zero(lambda: checkpoint.write_text(Path(args.output), json.dumps(results, indent=1) + "\n"))
        ranks.on_rank_zero(lambda: shutil.rmtree(f"{args.output}.parts", ignore_errors=True))
    if args.json:
        ranks.say(json.dumps({"rows": results["rows"], "missing": len(missing)}))
    if missing and args.strict:
        raise SystemExit(1)
    return results["rows"]


def spread(keys, encode, work, batch_size=1, parts=None, num_workers=0, failed=None, desc=""):
    """{key: value} for all keys, on every rank: the batches are shared over the ranks.

    encode(key) -> example, in loader processes; work(keys, examples) -> one JSON value a key. Which keys share a batch depends neither on
    the number of ranks nor on what is done.
    parts: a folder, in which each batch is on disk when it is done and from which the same call goes on; None: nothing is written.
    failed: a dict that takes {key: why} where encode raises ValueError (an image that cannot be read); None: that is an error.
    """
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    values = read_parts(parts) if parts else {}
    batches = [batch for batch in batches if not all(key in values for key in batch)]
    ranks.barrier()  # nobody writes before everybody has read
    mine, found, broken = batches[ranks.rank()::ranks.world()], {}, {}

    def guarded(key):
        try:
            return encode(key)
        except ValueError as error:
            if failed is None:
                raise
            return str(error)

    file = None
    if parts:
        Path(parts).mkdir(parents=True, exist_ok=True)
        file = open(Path(parts) / f"part-{ranks.rank()}.jsonl", "ab")
    stream = training.loader(guarded, mine, num_workers)
    for batch, examples in tqdm(zip(mine, stream), total=len(mine), desc=desc, disable=ranks.rank() > 0):
        good = [(key, example) for key, example in zip(batch, examples) if not isinstance(example, str)]
        broken |= {key: example for key, example in zip(batch, examples) if isinstance(example, str)}
        if good:
            new = dict(zip((key for key, _ in good), work([key for key, _ in good], [example for _, example in good])))
            found |= new
            if file:
                file.write(part_lines(new))
                file.flush()
    if file:
        file.close()
    for theirs, missing in ranks.gather((found, broken)):
        values |= theirs
        if failed is not None:
            failed.update(missing)
    return {key: values[key] for key in keys if key in values}


def part_lines(values):
    """{key: value} as bytes to append to a part file; the first newline ends a line that a kill may have torn."""
    return ("\n" + "".join(json.dumps([key, value], ensure_ascii=False) + "\n" for key, value in values.items())).encode()


def read_parts(folder):
    """What earlier calls have written, {key: value}; a line that a kill tore is left out."""
    values = {}
    for part in sorted(Path(folder).glob("part-*.jsonl")):
        for line in part.read_bytes().split(b"\n")[:-1]:
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            values[key] = value
    return values
