"""A script for test_distributed.py: the reduced gradients of one step of Eq. 6 and of Eq. 11.

The step has 4 studies, for any number of ranks and micro-batches. Rank 0 writes the file.

    gradients.py BASE WORLD OUT MICRO_BATCH
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import apo  # noqa: E402
import data  # noqa: E402
import student  # noqa: E402
import training  # noqa: E402
from runtime import ranks  # noqa: E402

base, world, out, micro = sys.argv[1:]
device = ranks.init()
task = data.load_task(f"{world}/task.json")
studies = data.read_studies(f"{world}/studies.jsonl", task)[:4]
names = data.teacher_names(studies)
del studies[1].trajectories[names[2]]  # ragged: one teacher did not answer
processor = student.Processor(base, task, world)
examples = [
    processor(s, data.student_prompt(s, task), [s.trajectories.get(n) for n in names])
    for s in studies]
mine = [range(4)[i:i + int(micro)] for i in range(0, 4, int(micro))]
first, behind = (len(mine) * rank // ranks.world() for rank in (ranks.rank(), ranks.rank() + 1))
mine = mine[first:behind]
tokens = sum(len(r) for e in examples for r in e["responses"] if r is not None)
gradients = {}
for train in ("decoder,merger,vision", "lora", "merger"):
    model = student.load(base)
    parameters = student.set_trainable(model, train.split(","), dropout=0.0)
    student.enable_gradient_checkpointing(model)
    packed = training.wrap(student.PackedStudent(model), device).train()
    for equation in ("eq6", "eq11"):
        model.zero_grad(set_to_none=False)
        for at, indices in enumerate(mine):
            batch = student.pack([examples[i] for i in indices], model)
            with training.micro_step(packed, batch, at == len(mine) - 1, 0, 0, at):
                (logps,) = packed(batch)
                if equation == "eq6":
                    loss = -logps.sum() / tokens
                else:
                    losses, _ = apo.apo_loss(
                        logps, logps.detach() + 0.1, mask=batch["tokens"][:, 1:] > 0)
                    loss = losses.sum() / 4
                (loss * ranks.world()).backward()
        gradients |= {
            f"{train} {equation} {name}": p.grad.clone() for name, p in parameters.items()}
if ranks.rank() == 0:
    save_file(gradients, out)
ranks.close()
