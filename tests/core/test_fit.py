"""The loop: trains, resumes to the bit, accumulates, keeps the best epoch, stops where the loss is not finite."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from spikedistill.core.fit import Stage, TrainingError, fit
from spikedistill.core.plan import Plan, merge
from spikedistill.core.step import Pass
from spikedistill.data import Tensors
from spikedistill.methods import bkd, ce
from spikedistill.objectives import CE, PerStep
from tests.methods.toy import CLASSES, toy_student, toy_teacher


def toy_data(samples=40, batch_size=8, shuffle=True, seed=0):
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % CLASSES
    images = torch.rand(samples, 2, 8, 8, generator=g) * 0.3
    images[torch.arange(samples), labels % 2] += 0.1 + 0.3 * (labels // 2)[:, None, None]
    return Tensors(images, labels, batch_size=batch_size, shuffle=shuffle, seed=seed)


def stage(student=None, **how):
    student = student or toy_student()
    torch.manual_seed(5)
    plan = bkd(student, toy_teacher(), blur=0.4, weight=1e-2)
    default = dict(epochs=3, valid=toy_data(16, shuffle=False), optim=partial(AdamW, lr=0.01))
    return student, Stage(toy_data(), **vars(plan) | default | how)


def equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("how", [{}, {"ema": 0.8}, {"accumulate": 2, "clip": 0.1}], ids=["plain", "ema", "accumulate"])
@pytest.mark.parametrize("at", [2, 7])
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(tmp_path, how, at):
    whole, s = stage(**how)
    expected = fit(s, progress=False)
    count = 0

    def stop(progress):
        nonlocal count
        count += 1
        if count == at:
            raise Stopped

    _, s = stage(**how, after_step=[stop])
    with pytest.raises(Stopped):
        fit(s, tmp_path, save_every=0, progress=False)
    resumed, s = stage(**how)
    torch.rand(7)  # whatever else the process drew in between must not matter
    result = fit(s, tmp_path, progress=False)
    assert equal(whole, resumed)
    losses = [[e["loss"] for e in r["epochs"]] for r in (expected, result)]
    assert losses[0] == losses[1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]


SCRIPT = """
import sys, torch, time
from tests.core.test_fit import stage
from spikedistill.core.fit import fit
torch.set_num_threads(1)
student, s = stage(epochs=4)
slow = len(sys.argv) > 3
s.after_step = [lambda p: (print("step", flush=True), time.sleep(0.2))] if slow else []
fit(s, sys.argv[1], save_every=0, progress=False)
torch.save(student.state_dict(), sys.argv[2])
"""


def test_killed_with_sigkill_and_run_again(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.getcwd()}

    def command(*words):
        return [sys.executable, str(script), *map(str, words)]

    subprocess.run(command(tmp_path / "a", tmp_path / "a.pt"), env=env, check=True)
    process = subprocess.Popen(command(tmp_path / "b", tmp_path / "b.pt", "slow"), env=env, stdout=subprocess.PIPE)
    assert process.stdout
    for _ in range(7):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b.pt").exists() and (tmp_path / "b" / "checkpoint.pt").exists()
    subprocess.run(command(tmp_path / "b", tmp_path / "b.pt"), env=env, check=True)
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in "ab")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_finished_folder_gives_its_weights_and_result_again(tmp_path):
    first, s = stage()
    result = fit(s, tmp_path, progress=False)
    second, s = stage(toy_student(seed=8))
    assert fit(s, tmp_path, progress=False) == result
    assert equal(first, second)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    fit(stage()[1], tmp_path, progress=False)
    with pytest.raises(TrainingError, match="another stage: it differs in epochs"):
        fit(stage(epochs=4)[1], tmp_path, progress=False)


def test_accumulation_equals_one_large_batch():
    """Two batches of four are one of eight where nothing depends on the batch (no norm in the model)."""

    def train(batch_size, accumulate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES)).double()
        data = toy_data(24, batch_size)
        data = [{k: v.double() if k == "x" else v for k, v in b.items()} for b in data.epoch(0)]
        how = dict(optim=partial(SGD, lr=0.1), lr=lambda p: 1.0, accumulate=accumulate, epochs=2)
        fit(Stage(data, {"student": Pass(model, grad=True)}, {"ce": (1, CE())}, **how), progress=False)
        return model

    for a, b in zip(train(8, 1).parameters(), train(4, 2).parameters()):
        torch.testing.assert_close(a, b)


def test_clip_limits_the_update():
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES))
    before = model[1].weight.detach().clone()
    how = dict(optim=partial(SGD, lr=1.0, weight_decay=0), lr=lambda p: 1.0, clip=1e-3, epochs=1)
    fit(Stage(toy_data(8), {"student": Pass(model, grad=True)}, {"ce": (1, CE())}, **how), progress=False)
    assert 0 < (model[1].weight - before).norm() <= 1.001e-3


def test_the_best_epoch_on_validation_is_kept_or_the_last():
    scores = []
    for select in ("best", "last"):
        _, s = stage(select=select, epochs=4, optim=partial(AdamW, lr=0.05))
        result = fit(s, progress=False)
        valid = [e["valid_accuracy"] for e in result["epochs"]]
        assert result["best"] == (valid.index(max(valid)) if select == "best" else 3)
        scores.append(valid)
    assert scores[0] == scores[1]


def test_learns_a_simple_task():
    _, s = stage(epochs=15, optim=partial(AdamW, lr=0.02))
    assert fit(s, progress=False)["epochs"][-1]["accuracy"] > 0.8


def test_loss_that_is_not_finite_names_step_and_term_and_keeps_the_checkpoint(tmp_path):
    _, s = stage()

    def poison(batch, progress):
        return batch | {"x": batch["x"] * float("nan")} if progress > 0.4 else batch

    s.prepare = poison
    with pytest.raises(TrainingError, match=r"epoch 2, step 3: bkd = nan.*checkpoint"):
        fit(s, tmp_path, save_every=0, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["trainee"].values() if v.is_floating_point())


class Poisoned(torch.autograd.Function):
    """A loss that is finite, of a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@pytest.mark.parametrize("epoch", [1, 2])
def test_weights_that_are_not_finite_are_never_kept(tmp_path, epoch):
    """The last update of an epoch is followed by no loss that would show it."""
    _, s = stage()
    last = (epoch * 5 - 1) / 15

    def term(step):
        z = step.student.logits.sum() * 0
        return Poisoned.apply(z) if abs(step.progress - last) < 1e-9 else z

    s.loss = {**s.loss, "late": (1.0, term)}
    with pytest.raises(TrainingError, match=rf"after an update in epoch {epoch}: models.* = nan.*too high") as error:
        fit(s, tmp_path, progress=False)
    kept = tmp_path / "checkpoint.pt"
    assert kept.exists() == (epoch == 2) == ("last good checkpoint" in str(error.value))
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        assert all(v.isfinite().all() for v in state["trainee"].values() if v.is_floating_point())


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Overflows(nn.Module):
        def forward(self, x):
            return x if self.training else x * float("inf")

    student = toy_student()
    student.out = Overflows()
    _, s = stage(student)
    with pytest.raises(TrainingError, match="epoch 1: valid_loss = nan"):
        fit(s, tmp_path, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "metrics.jsonl").read_text() == ""


def test_parameters_of_five_axes_train():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.body = nn.Parameter(torch.ones(1, 1, 1, 1, 1)), toy_student()
            self.grey = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            return self.body(x * self.kernel[0]) + self.grey(x[:, :1]).mean()

    model = Clip()
    assert fit(Stage(toy_data(), **vars(ce(model)), epochs=1), progress=False)["epochs"]
    assert model.body.stage2[1].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.grey.weight.stride() == (9, 1, 3, 1)  # its convolution adds in the order of this layout


def test_the_learning_rate_follows_the_schedule():
    seen = []
    student = toy_student()
    optimizers = []

    def optim(groups):
        optimizers.append(SGD(groups, lr=2.0))
        return optimizers[-1]

    plan = vars(ce(student)) | {"after_step": [lambda p: seen.append(optimizers[0].param_groups[0]["lr"])]}
    s = Stage(toy_data(16, 8), **plan, optim=optim, lr=lambda p: 1 - p, epochs=2, clip=1e-9)
    fit(s, progress=False)
    assert seen == [2.0, 1.5, 1.0, 0.5]


def test_norms_and_biases_have_no_weight_decay():
    from spikedistill.core.fit import parameter_groups

    student = toy_student()
    decayed, free = parameter_groups(student)
    assert free["weight_decay"] == 0 and "weight_decay" not in decayed
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len([*student.parameters()])


def test_a_frozen_pass_runs_only_when_looked_at_and_keeps_its_mode():
    calls = []

    class Teacher(nn.Module):
        def forward(self, x):
            calls.append(self.training)
            return x.new_zeros(len(x), CLASSES)

    teacher, student = Teacher(), toy_student()
    plan = Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, {"ce": (1, CE())})
    fit(Stage(toy_data(8), **vars(plan), epochs=1), progress=False)
    assert calls == []
    plan.loss["per_step"] = (1, PerStep(CE()))  # cuts the passes into steps, and still looks at one alone
    fit(Stage(toy_data(8), **vars(plan), epochs=1), progress=False)
    assert calls == []
    plan.loss["late"] = (lambda p: float(p >= 0.5), lambda step: step.teacher.logits.sum())
    fit(Stage(toy_data(16), **vars(plan), epochs=2), progress=False)
    assert calls == [False, False] and teacher.training


def test_mistakes_in_a_stage_are_errors():
    student = toy_student()
    frozen = Plan({"student": Pass(student)}, {"ce": (1, CE())})
    with pytest.raises(ValueError, match="nothing would be trained"):
        fit(Stage(toy_data(), **vars(frozen)), progress=False)
    plan = ce(student)
    plan.loss["vector"] = (1, lambda step: step.student.logits.sum((0, 2)))
    with pytest.raises(ValueError, match="'vector' must be a scalar"):
        fit(Stage(toy_data(), **vars(plan)), progress=False)
    with pytest.raises(ValueError, match="reads stream 'events': the batch has x, y, index"):
        fit(Stage(toy_data(), {"student": Pass(student, x="events", grad=True)}, {"ce": (1, CE())}), progress=False)
    with pytest.raises(ValueError, match=r"the weight of every term is 0 \(ce\)"):
        fit(Stage(toy_data(), {"student": Pass(student, grad=True)}, {"ce": (0.0, CE())}), progress=False)
    with pytest.raises(TrainingError, match="can be read once only"):
        fit(Stage(iter([*toy_data()]), **vars(ce(student))), progress=False)
    plan = ce(student)
    plan.loss["of"] = (1, lambda step: step["techer"].logits.sum())
    with pytest.raises(KeyError, match="no pass 'techer' in this step: there are student"):
        fit(Stage(toy_data(), **vars(plan)), progress=False)


DDP = """
import sys, torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from tests.core.test_fit import stage
from spikedistill.core.fit import fit
fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(find_unused_parameters=True), devices=2)
fabric.launch()
student, s = stage()
result = fit(s, sys.argv[1], fabric=fabric, progress=False)
scores = [e["valid_accuracy"] for e in result["epochs"]]
torch.save([student.state_dict(), scores], f"{sys.argv[1]}/rank{fabric.global_rank}.pt")
"""


def test_two_processes_hold_the_same_student(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    env = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, check=True, timeout=120, capture_output=True)
    (a, va), (b, vb) = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and va == vb
    started = toy_student().state_dict()
    assert not torch.equal(a["head.weight"], started["head.weight"])


def test_merged_plans_train_together():
    student, teacher = toy_student(), toy_teacher()
    plan = merge(bkd(student, teacher), ce(student))
    result = fit(Stage(toy_data(16), **vars(plan), epochs=1), progress=False)
    assert {"ce", "bkd", "wsld", "loss", "accuracy"} <= set(result["epochs"][0])


def test_time_is_counted_over_interruptions(tmp_path):
    _, s = stage()
    began = time.perf_counter()
    result = fit(s, tmp_path, progress=False)
    assert 0 < result["seconds"] <= time.perf_counter() - began and result["cpu_seconds"] > 0
    _, again = stage()
    assert fit(again, tmp_path, progress=False)["cpu_seconds"] == result["cpu_seconds"], "as the checkpoint has it"


def test_a_frozen_student_is_said_to_be_frozen():
    _, work = stage()
    for module in (*(p.model for p in work.passes.values()), *(term for _, term in work.loss.values())):
        module.requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        fit(work)
