"""Transforms as text, in a saved model, in the loop and in a row."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import models, optim, runs, transforms
from spikedistill.core.fit import Stage, fit
from spikedistill.core.plan import merge as merge_plans
from spikedistill.core.taps import infer
from spikedistill.methods import bkd
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_teacher
from tests.transforms.awake import awake

SHAPE = [2, 8, 8]
TEXTS = [
    "tt_snn(rank=2, mode=sequential)",
    "tt_snn(rank=2, mode=half, where='*', schedule=(True, False, False))",
    "tt_snn(where=['stage2*'], rank=0.9)",
    "unstructured_pruning(mean=0.1, std=0.2, search=0.5, weight=1e-6, stem=True)",
    "factorise",
]
every = pytest.mark.parametrize("text", TEXTS)


def student() -> Any:
    torch.manual_seed(0)
    return models.build("small(widths=(5, 6), neuron='lif(v_th=0.5)')", classes=4, channels=2, steps=3)


@every
def test_rewrites_in_place_and_keeps_taps(text):
    model = student()
    dims, names = dict(model.dims), {n for n, _ in model.named_children()}
    assert transforms.check(text, ["shape"]) == []
    assert transforms.apply(model, text, shape=SHAPE) is model
    assert model.dims == dims and {n for n, _ in model.named_children()} == names
    out = infer(model, toy_batch()["x"], taps=[*dims])
    assert [out.taps[tap].shape[2] for tap in dims] == [*dims.values()]


@every
def test_trains_with_bkd(text):
    model, batch = transforms.apply(student(), text, shape=SHAPE), toy_batch()
    plans = [bkd(model, toy_teacher())]
    extra = transforms.plan(model)
    assert (extra is None) == ("pruning" not in text)
    plan = merge_plans(*plans, *([extra] if extra else []))
    before = copy.deepcopy(model.state_dict())
    result = fit(Stage([batch] * 2, **vars(plan), epochs=2, select="last", valid=[batch]), progress=False)
    assert result["epochs"][0]["loss"] > 0
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert all(k in moved for k, _ in model.named_parameters())
    assert len(plan.loss) == 3 + bool(extra)


@every
def test_saved_and_loaded_before_and_after_merging(text, tmp_path):
    x = toy_batch()["x"]
    model: Any = awake(transforms.apply(student(), text, shape=SHAPE), x)
    before = infer(model, x).logits
    for name in ("rewritten", "merged"):
        if name == "merged":
            transforms.merge(model)
        assert len(model.spec["transforms"]) == 1 + (name == "merged")
        runs.save(model, tmp_path / f"{name}.safetensors")
        spec = runs.about(tmp_path / f"{name}.safetensors")["spec"]
        fresh = transforms.apply_spec(models.build(spec["model"], **spec["settings"]), spec)
        assert fresh.spec == spec == model.spec
        loaded = runs.load(tmp_path / f"{name}.safetensors", fresh)
        torch.testing.assert_close(infer(loaded, x).logits, before, atol=1e-5, rtol=0)
    assert before.abs().max() > 0


def test_an_estimated_rank_is_written_down_as_a_number():
    model: Any = student()
    nn.init.constant_(model.stage2[1].conv.weight, 1.0)  # rank 1, clamped
    transforms.apply(model, "tt_snn(rank=vbmf)")
    assert model.spec["transforms"] == [
        "tt_snn(rank=[5], mode='parallel', where=['stage2.1.conv'], downsample='maxpool', schedule=[])"
    ]


def test_a_function_that_chooses_is_written_down_as_names():
    model: Any = transforms.tt_snn(student(), rank=2, where=lambda name, module: name == "stem.conv")
    fresh = transforms.apply_spec(student(), model.spec)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_in_a_row():
    x, model = toy_batch()["x"], student()
    for text in ("factorise", "unstructured_pruning(mean=0.1, std=0.2)"):
        transforms.apply(model, text, shape=SHAPE)
    assert transforms.plan(model)
    model = awake(model, x)
    before, spec = infer(model, x).logits, model.spec
    transforms.merge(model)
    torch.testing.assert_close(infer(model, x).logits, before, atol=1e-5, rtol=0)
    again: Any = transforms.apply_spec(student(), spec)
    assert again.state_dict().keys() == transforms.apply_spec(student(), again.spec).state_dict().keys()
    assert len(spec["transforms"]) == 2 and len(model.spec["transforms"]) == 3
    assert 0 < (model.stage2[1].conv.weight == 0).float().mean() < 1


def test_pruning_that_folding_would_undo_is_refused():
    model = transforms.apply(transforms.apply(student(), "tt_snn(rank=3)"), "unstructured_pruning", shape=SHAPE)
    with pytest.raises(SpecError, match="multiplies the gated cores into a full kernel"):
        transforms.plan(model)
    with pytest.raises(SpecError, match=r"tt_snn: 'stage2\.1\.conv' has gates"):
        transforms.apply(transforms.apply(student(), "unstructured_pruning", shape=SHAPE), "tt_snn(rank=3)")
    how = dict(lr=0.1, weight_decay=0.0, updates=2)
    for text in ("tt_snn(rank=3)", "factorise"):
        for name in ("stds", "sgd_stds"):
            with pytest.raises(SpecError, match=f"optimizer: {name} would prune the factors"):
                optim.make(name, student=transforms.apply(student(), text), **how)
            (found,) = optim.check(name, "last", None, ["kd", text])
            assert found.endswith(f"leave out {text}")
        assert optim.make("adamw", student=transforms.apply(student(), text), **how)
    assert optim.make("stds", student=student(), **how) and not optim.check("stds", beside=["kd"])


def test_a_model_without_spec_gets_none():
    model = student()
    del model.spec
    assert not hasattr(transforms.apply(model, "tt_snn(rank=2)"), "spec")


@pytest.mark.parametrize(
    "text, mistakes",
    [
        ("tt_sn(rank=2)", ["transform 'tt_sn' is unknown; did you mean 'tt_snn'?"]),
        ("tt_snn(2)", ["transform 'tt_snn(2)': give settings by name, tt_snn(key=value)"]),
        ("tt_snn(rnk=2)", ["tt_snn.rnk: no such setting; did you mean 'rank'?"]),
        ("unstructured_pruning", ["unstructured_pruning.shape: is needed; write unstructured_pruning(shape=...)"]),
        ("merge(x=1)", ["merge.x: no such setting; it takes none"]),
        ("tt_snn(rank=2", None),
    ],
)
def test_mistakes(text, mistakes):
    found = transforms.check(text)
    assert found == mistakes or (mistakes is None and found[0].startswith("cannot read 'tt_snn(rank=2'"))
    with pytest.raises(SpecError) as error:
        transforms.apply(student(), text)
    assert error.value.mistakes == found


@pytest.mark.parametrize("setting", ["rank=0", "rank=1.5", "rank=[]", "rank='all'", "mode='both'", "schedule=3"])
def test_settings_out_of_range(setting):
    found = transforms.check(f"tt_snn({setting})")
    if setting == "rank=[]":
        assert found == []
        with pytest.raises(SpecError, match="0 ranks for 1 layers"):
            transforms.apply(student(), f"tt_snn({setting})")
    else:
        assert len(found) == 1 and found[0].startswith(f"tt_snn.{setting.split('=')[0]}: ")


def test_what_prunes_until_training_ends_needs_the_last_epoch():
    assert transforms.check("unstructured_pruning", ["shape"], "last") == []
    (found,) = transforms.check("unstructured_pruning", ["shape"], "best")
    assert (
        found
        == "unstructured_pruning prunes until training ends: it needs --select last, an earlier epoch is pruned less"
    )
    (found,) = transforms.check("unstructured_pruning(mean=0.1)", ["shape"], "last", 0.99)
    assert found.endswith("drop --ema") and transforms.check("tt_snn", ["shape"], "best", 0.99) == []
    (found,) = optim.check("stds(threshold=0.5)", "last", 0.99)
    assert "an average is not pruned: leave out --ema" in found and optim.check("adamw", "best", 0.99) == []


def test_every_mistake_at_once():
    found = transforms.check("unstructured_pruning(weight=-1, search=0, slop=3)", ["shape"])
    assert [m.split(":")[0].split(".")[1] for m in found] == ["weight", "search", "slop"]


def test_the_text_goes_before_what_the_caller_knows():
    model: Any = transforms.apply(student(), "unstructured_pruning(shape=[2, 16, 16])", shape=SHAPE)
    assert "shape=[2, 16, 16]" in model.spec["transforms"][0]
