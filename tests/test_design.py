"""The worked example of docs/design.md is run as it stands there."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from spikedistill import methods
from spikedistill.core.fit import Stage, fit
from spikedistill.core.plan import merge
from tests.methods import test_contract as contract
from tests.methods.toy import toy_batch, toy_student, toy_teacher

PAGE = Path(__file__).parent.parent / "docs" / "design.md"


@pytest.fixture
def logit_std(tmp_path, monkeypatch):
    code = re.search(r"```python\n(\"\"\"Match the standard.*?)```", PAGE.read_text(), re.S).group(1)
    (tmp_path / "logit_std.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("logit_std")
    yield module
    del sys.modules["logit_std"]


def test_the_formula_in_loops(logit_std):
    s, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def spread(row):
        mean = sum(row) / len(row)
        return (sum((v - mean) ** 2 for v in row) / (len(row) - 1)) ** 0.5

    expected = sum((spread(a) - spread(b)) ** 2 for a, b in zip(s.tolist(), t.tolist())) / 3
    assert logit_std.logit_std_loss(s, t).item() == pytest.approx(expected)


def test_it_passes_the_contract_and_merges(logit_std):
    build = partial(logit_std.logit_std, weight=0.3)
    checks = [f for name, f in vars(contract).items() if name.startswith("test_") and hasattr(f, "pytestmark")]
    run = [f for f in checks if {m.args[0] for m in f.pytestmark} == {"build"}]
    assert len(run) >= 6
    for check in run:
        check(build)
    for teacher_steps, student_steps in ((1, 1), (1, 3), (2, 1), (3, 3)):
        contract.test_any_number_of_steps_on_either_side(build, teacher_steps, student_steps)
    student, teacher = toy_student(), toy_teacher()
    plan = merge(build(student, teacher), methods.bkd(student, teacher))
    assert fit(Stage([toy_batch()], **vars(plan), epochs=1), progress=False)["epochs"][0]["logit_std"] > 0
