"""The run folder: claimed for one command, saved to, continued, finished.

    args.json     the settings            env.json      versions, GPUs, git commit
    log.jsonl     one line per interval   speed.jsonl   the same for timings
    step-N/       checkpoints             too_long.jsonl  studies that are too long, or cut
    broken.jsonl  with --skip_broken: the images that cannot be read, and their studies
    student/      the finished student    adapter/      its LoRA weights in PEFT's format
    finished.json marks the end; of stage 2 positives.jsonl, dropped.jsonl, stats.json
    reference.safetensors, and reference.parts/ while it is made, of stage 3

No file or folder is left half-written: each is written under a temporary name, flushed to the disk
and renamed.
"""

import fcntl
import fnmatch
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from runtime import ranks
from runtime.checkpoint import fingerprint, load_checkpoint, newest_checkpoint, save_checkpoint
from runtime.log import Log
from runtime.records import read_json, read_jsonl, remove, write_jsonl, write_text
from runtime.shared import found_instead, open_own

# flags that change no number; a server may move, which model it serves is a setting
NOT_SETTINGS = ("output_dir", "base", "earlier", "resume", "resume_anyway", "merge",
                "logging_steps", "save_steps", "save_total_limit", "num_workers", "dry_run",
                "server", "server_key_env", "server_concurrency", "i_have_permission")

# What a run writes into its folder, where other files may be too. --resume never removes what the
# run in args.json wrote; args.json is first here and goes last.
OF_A_RUN = ("args.json", "env.json", "broken.jsonl", "finished.json")
OF_TRAINING = ("log.jsonl", "speed.jsonl", "too_long.jsonl", "step-*", "reference.safetensors",
               "reference.parts", "student", "adapter")
OF_SAMPLING = ("positives.jsonl", "dropped.jsonl", "stats.json", "part-*.jsonl")
FOLDERS = ("step-*", "reference.parts", "student", "adapter")

# settings that may change during a run with --resume_anyway, since each step keeps its studies
SAME_STEPS = {"world_size", "micro_batch", "gradient_checkpointing"}


class RunFolder:
    """A context around all that a stage does in --output_dir; nothing is written with --dry_run.

    args    the stage's flags
    inputs  names of the flags that are files or students' folders, whose contents are settings
    path    the folder; None with --dry_run
    stop    ranks.Stop, which SIGTERM sets; None before `resume`
    Entering it locks the folder and writes args.json and env.json. Raises SystemExit where another
    run holds the folder, or a command with other settings began it.
    """

    def __init__(self, args, inputs):
        self.args = args
        self.inputs = {name: getattr(args, name) for name in inputs if getattr(args, name)}
        self.dry = getattr(args, "dry_run", False)
        self.path = None if self.dry else Path(args.output_dir)
        self.lock = self.stop = None

    def __enter__(self):
        if not self.dry:
            self.lock = ranks.on_rank_zero(self._claim)
            ranks.require_same(self._seen)
        return self

    def __exit__(self, kind, *_):
        # after an error SIGTERM must not end the process before it has said what was wrong
        if self.stop and kind is None:
            self.stop.over()
        if self.lock:
            self.lock.close()

    # ------------------------------------------------------------------------ whose folder it is

    def _seen(self):
        """What this rank sees of the folder, which must be one folder for all ranks."""
        held = self._named(written_by(vars(self.args))) if self.path.is_dir() else []
        digests = [fingerprint(path)[:12] for path in held if path.name == "args.json"]
        return {"--output_dir": " ".join([*digests, *(path.name for path in held)]) or "nothing"}

    def _claim(self):
        """Locks the folder for this command and writes its settings. Returns the lock."""
        settings, anew = self._settings(), self.args.resume == "never"
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        self._require_kinds(written_by(settings))
        is_new = anew or self._is_new_to(settings)
        claimed = self._require_own(settings)
        inputs = [Path(path).resolve() for path in self.inputs.values()]
        for old in reversed(claimed) if anew else ():
            if old.resolve() not in inputs:
                remove(old)
        for old in self._named([f".tmp-{name}" for name in written_by(settings)]):
            remove(old)  # a killed run left these half-written
        if is_new:
            write_text(self.path / "args.json", json.dumps(settings, indent=2) + "\n")
            write_text(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
        return lock

    def _settings(self):
        """What args.json holds: flags that change a number, and the digests of the inputs."""
        flags = {key: value for key, value in sorted(vars(self.args).items())
                 if key not in NOT_SETTINGS}
        # dropout and rounding depend on the number of ranks; what stage 2 samples does not
        if hasattr(self.args, "train"):
            flags["world_size"] = ranks.world()
        else:
            flags.pop("max_steps", None)  # stage 2 does not use it, but gives it to stage 1
        digests = {f"{name}_sha256": fingerprint(path) for name, path in self.inputs.items()}
        return json.loads(json.dumps({**flags, **digests}))

    def _lock(self):
        """The locked file .lock. The kernel unlocks it however the process ends."""
        lock = os.fdopen(open_own(self.path / ".lock", os.O_RDWR | os.O_CREAT), "r+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{self.path}: another run holds {self.path / '.lock'}; wait for it "
                             "or choose another --output_dir") from None
        except OSError as error:  # some shared disks have no locks
            ranks.print_once(f"warning: {self.path}: {error}; nothing keeps a second run out of "
                             "this folder")
        return lock

    def _named(self, patterns):
        """The paths in the folder whose names match one of `patterns`, in their order; links that
        lead nowhere too."""
        names = [path.name for path in sorted(self.path.iterdir())]
        return [self.path / name for pattern in patterns for name in fnmatch.filter(names, pattern)]

    def _require_kinds(self, patterns):
        """Raises SystemExit where a link, a pipe or the like has the name of what a run writes.

        Writing would fail at the end of the run, or reading would wait for ever. In a finished
        folder, which is only read, links may be.
        """
        for path in self._named(patterns):
            mode = (path.stat() if self.finished else path.lstat()).st_mode
            is_folder = any(fnmatch.fnmatch(path.name, pattern) for pattern in FOLDERS)
            if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
                kind = "folder" if is_folder else "regular file"
                raise SystemExit(f"{path}: {found_instead(mode)}, expected a {kind} that a run has "
                                 "written; remove it, or choose another --output_dir")

    def _require_own(self, settings):
        """What the run in args.json has written, [path].

        settings  what `_settings` returns
        Raises SystemExit where the run would replace something else.
        """
        claim = self.path / "args.json"
        before = read_json(claim) if claim.exists() else None
        claimed = self._named(written_by(before)) if isinstance(before, dict) else []
        for path in self._named(written_by(settings)):
            if path not in claimed:
                raise SystemExit(f"{path}: is there, but {self.path} has no args.json of a run "
                                 "that wrote it; expected another --output_dir")
        return claimed

    def _is_new_to(self, settings):
        """Whether the folder's args.json must be written.

        settings  what `_settings` returns
        Returns False where the folder has these settings already, and where it is the finished
        folder of an earlier stage. Raises SystemExit where it was begun with other settings that
        may not change.
        """
        if not (self.path / "args.json").exists():
            return True
        before = read_json(self.path / "args.json")
        if self.finished:  # the number of ranks matters only while the run goes on
            before["world_size"] = settings.get("world_size")
        # Inputs and images may be moved: what counts is the contents of the inputs, and the paths
        # of the images in the records.
        moved = {"images", *self.inputs}
        differ = [key for key in sorted({*before, *settings} - moved)
                  if before.get(key) != settings.get(key)]
        if not differ:
            return False
        listed = "".join(f"\n  {key}: {before.get(key)!r} there, {settings.get(key)!r} here"
                         for key in differ)
        other_input = any(key.endswith("_sha256") and before.get(key) and settings.get(key)
                          for key in differ)
        if getattr(self.args, "earlier", False) and self.finished and not other_input:
            ranks.print_once(f"{self.path}: is taken as it was made, with other settings:{listed}")
            return False
        if self._is_begun():
            may_change = self._may_change(differ)
            if not (may_change and getattr(self.args, "resume_anyway", False)):
                or_so = " or --resume_anyway" if may_change else ""
                raise SystemExit(f"{self.path}: was begun with other settings, choose another "
                                 f"--output_dir{or_so}:{listed}")
            ranks.print_once(f"{self.path}: goes on with other settings:{listed}")
        return True

    def _is_begun(self):
        """Whether the folder has results of a run: a checkpoint, samples, or the end."""
        samples = any(part.stat().st_size for part in self.path.glob("part-*"))
        return samples or any(self.path.glob("step-*")) or any(self.path.glob("finished*"))

    def _may_change(self, names):
        """Whether --resume_anyway may change all these settings of a run that was begun."""
        sharded = ranks.world() > 1 and "decoder" in getattr(self.args, "train", "")
        # each rank has saved its own part of a sharded optimiser
        allowed = SAME_STEPS - {"world_size"} if sharded else SAME_STEPS
        return allowed.issuperset(names)

    # ------------------------------------------------------------------------------ its contents

    @property
    def student(self):
        """The path of the finished student, also before it is there; None with --dry_run."""
        return self.path / "student" if self.path else None

    @property
    def finished(self):
        """Whether the folder has all that the command asks for. A run that ended with --no-merge is
        not finished for --merge, which then writes student/ from the last checkpoint."""
        if self.dry:
            return False
        wanted = "student" if getattr(self.args, "merge", False) else "finished.json"
        return (self.path / "finished.json").exists() and (self.path / wanted).exists()

    def resume(self, parameters, optimizer, names, device):
        """Goes on from the newest valid checkpoint, if any; from now on SIGTERM sets `stop`.

        parameters  {name: parameter} of what trains, which take the checkpoint's values
        optimizer   which takes the checkpoint's state
        names       keys of the log
        device      torch.device of the log's collective
        Returns (how many steps are done, Log). Raises SystemExit with status 2 where --resume is
        'must' and there is no valid checkpoint.
        """
        path, manifest = newest_checkpoint(self.path)
        ranks.require_same(lambda: {"the newest checkpoint": str(manifest and manifest["step"])})
        step, sums = 0, None
        if path is not None:
            load_checkpoint(path, parameters, optimizer)
            ranks.print_once(f"continuing from {path}")
            step, sums = manifest["step"], manifest["log"]
        elif self.args.resume == "must":
            ranks.print_once(f"{self.path}: --resume must, but there is no valid checkpoint")
            raise SystemExit(2)
        self.stop = ranks.Stop()
        return step, Log(self.path, names, device, step, sums)

    def save_if_due(self, step, plan, parameters, optimizer, log, stopping):
        """Writes a checkpoint after every --save_steps steps, at the end, and before a stop.

        step        how many steps are done
        plan        training.Plan
        parameters  {name: parameter} of what trains
        optimizer   whose state is saved
        log         Log, whose open interval is saved
        stopping    whether a rank was asked to stop
        Raises SystemExit with status 0 where the run stops before its end.
        """
        if plan.due(step, self.args.save_steps) or stopping:
            keep = self.args.save_total_limit
            save_checkpoint(self.path, step, parameters, optimizer, {"log": log.sums}, keep)
        if stopping and step < plan.steps:
            ranks.print_once(f"stopped after step {step}; the same command goes on")
            raise SystemExit(0)

    def outputs(self, stage, **more):
        """What a stage returns: some flags of the next stage.

        stage  learn, compare or critique, for the line that says that the folder is finished
        more   further flags, or another student than the folder's
        Returns {"studies", "images", "task_file", "student", ...}.
        """
        ranks.print_once(f"{stage}: {self.path} is finished")
        of_data = {name: getattr(self.args, name) for name in ("studies", "images", "task_file")}
        return {**of_data, "student": self.student, **more}

    def write_text(self, name, text):
        """Writes the file `name`, whole or not at all, on rank 0; does nothing in a dry run."""
        if self.path:
            ranks.on_rank_zero(lambda: write_text(self.path / name, text))

    def write_lines(self, name, records):
        """Writes `records`, one JSON object a line, to the file `name`, as `write_text` does."""
        if self.path:
            ranks.on_rank_zero(lambda: write_jsonl(self.path / name, records))

    def read_lines(self, name):
        """What a run that goes on wrote to the file `name` when it began.

        Returns its records, the same on every rank; None where the run begins, or has no such file.
        """
        def read():
            if self.dry or not self._is_begun() or not (self.path / name).exists():
                return None
            return [record for _, record in read_jsonl(self.path / name)]

        return ranks.gather(ranks.on_rank_zero(read))[0]

    def mark_finished(self, **what):
        """Writes `what` as finished.json and removes the parts of the work that is finished."""
        self.write_text("finished.json", json.dumps(what) + "\n")
        if ranks.rank() == 0 and not hasattr(self.args, "train"):
            for part in self._named(["part-*.jsonl"]):
                part.unlink()


def written_by(settings):
    """The patterns of the names that a run writes. settings: its flags; only training has train."""
    return *OF_A_RUN, *(OF_TRAINING if "train" in settings else OF_SAMPLING)


def environment():
    """What env.json contains: versions, git commit, command, devices."""
    commit = ""
    if shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=False)
        commit = done.stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit, "command": sys.argv,
            "devices": gpus or [platform.processor() or "cpu"]}
