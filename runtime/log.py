"""log.jsonl, with one line per interval of a run's steps, and speed.jsonl, which has the timings.

They are two files because a log is the same after a resume, while timings are never the same twice.
"""

import json
import math
import time
from pathlib import Path

import torch

from runtime import ranks
from runtime.records import write_text


class Log:
    """Writes one JSON line for each interval of steps: the means of some numbers over it.

    folder  the run folder
    names   the keys of a line
    device  torch.device of the collective that sums over the ranks
    step    the step from which the run goes on; later lines of both files are removed
    sums    {name: [sum, count]} of the interval in which the run was stopped; None: a new interval
    """

    def __init__(self, folder, names, device, step=0, sums=None):
        self.path, self.names, self.device = Path(folder) / "log.jsonl", list(names), device
        self.sums = dict(sums) if sums else {name: [0.0, 0.0] for name in self.names}
        self.line, self.clock = {}, time.perf_counter()
        self.begin_step()
        if ranks.rank() == 0:
            for path in (self.path, self.path.with_name("speed.jsonl")):
                lines = path.read_text().splitlines() if path.exists() else []
                kept = [line for line in lines
                        if line.endswith("}") and json.loads(line)["step"] <= step]
                write_text(path, "".join(line + "\n" for line in kept))

    def begin_step(self):
        """Sets this rank's sums of a step to zero; the last row is for the wish to stop."""
        self.now = torch.zeros(len(self.names) + 1, 2, dtype=torch.float64)

    def add(self, name, total, count=1):
        """Adds to this rank's sums of the current step.

        name   one of `names`
        total  a sum over `count` of something
        """
        added = torch.tensor([float(total), float(count)], dtype=torch.float64)
        self.now[self.names.index(name)] += added

    def reduce(self, stop=False):
        """Adds the step, summed over all ranks by one all-reduce, to the interval.

        stop  whether this rank was asked to stop
        Returns whether any rank was asked. Raises FloatingPointError, on all ranks together, where
        a sum is not finite; the gradients of a loss that is not finite can be finite.
        """
        self.now[-1, 0] = float(stop)
        summed = ranks.all_reduce(self.now.to(self.device)).cpu()
        step = dict(zip(self.names, summed.tolist()))
        for name, (total, _) in step.items():
            if not math.isfinite(total):
                raise FloatingPointError(f"{name} of the step is {total}; nothing was updated. "
                                         "The studies are named above")
        for name, (total, count) in step.items():
            total_before, count_before = self.sums[name]
            self.sums[name] = [total_before + total, count_before + count]
        self.begin_step()
        return bool(summed[-1, 0])

    def write_if_due(self, step, plan, **more):
        """Calls `write` after every --logging_steps steps and at the end.

        step  how many steps are done
        plan  training.Plan
        more  what else is in the line
        Returns the line, a dict, or None where none is due.
        """
        return self.write(step, **more) if plan.due(step, plan.args.logging_steps) else None

    def write(self, step, **more):
        """Writes the line of an interval and begins the next one.

        step  how many steps are done
        more  what else is in the line
        Returns the line, a dict.
        """
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.line = {"step": step, **means, **more}
        seconds = time.perf_counter() - self.clock
        speed = {"step": step, "seconds": seconds}
        if "tokens" in self.sums:
            tokens, _ = self.sums["tokens"]
            speed["tokens_per_second"] = tokens / seconds
        if self.device.type == "cuda":
            speed["peak_gib"] = ranks.peak_gib(self.device)
        if ranks.rank() == 0:
            speed_path = self.path.with_name("speed.jsonl")
            for path, record in ((self.path, self.line), (speed_path, speed)):
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        self.sums = {name: [0.0, 0.0] for name in self.names}
        self.clock = time.perf_counter()
        return self.line
