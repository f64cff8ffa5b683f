"""BKD and `kd_loss` in a loop of your own, without `fit`, plans or run folders."""

import torch
from torch.nn.functional import cross_entropy

import spikedistill as sd
from spikedistill.core.taps import call, infer
from spikedistill.functional import kd_loss
from spikedistill.methods.bkd import bkd_loss, blur


def train(student, teacher, batches, epochs=1, tap="stage3", width=128, teacher_width=128, lr=1e-2):
    """Any student and teacher with a tap of that name; batches of {"x", "y"}. Returns the last loss."""
    adapt = torch.nn.Conv2d(width, teacher_width, 3, padding=1)  # for training only: it stays here
    optimizer = torch.optim.AdamW([*student.parameters(), *adapt.parameters()], lr=lr)
    student.train()
    for _ in range(epochs):
        for batch in batches:
            x, y = batch["x"], batch["y"]
            s, t = call(student, x, taps=[tap]), infer(teacher, x, taps=[tap])  # logits and taps are [T, B, ...]
            z, target = s.logits.mean(0), t.logits.mean(0)
            feature = adapt(blur(s.taps[tap].mean(0), 0.15))
            loss = cross_entropy(z, y) + kd_loss(z, target, tau=2.0) + 7e-5 * bkd_loss(feature, t.taps[tap].mean(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


if __name__ == "__main__":
    data = sd.data.load("fashion-mini", batch_size=64)
    made = dict(mean=data.mean, std=data.std)
    teacher = sd.models.small(neuron="relu", **made)  # trained in the same way, by cross-entropy alone
    for batch in data.train:
        cross_entropy(teacher(batch["x"]).mean(0), batch["y"]).backward()
        with torch.no_grad():
            for p in teacher.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    student = sd.models.small(**made)
    print("loss", train(student, teacher, data.train), "test", sd.evaluate(student, data.test)["accuracy"])
