"""The report of a run and of a comparison: what is in it, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill import cli
from spikedistill.recipes.compare import compare
from spikedistill.recipes.distill import distill
from spikedistill.report import page
from spikedistill.spec import SpecError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUN = {"curves", "accuracy_by_step", "firing_rates", "raster", "accuracy_cost", "energy", "confusion", "disagreements"}
COMPARE = {"accuracies", "paired_differences", "pareto", "accuracy_by_step", "learning", "energy"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of ce and kd on tiny images; its folder."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for c, name in enumerate(("left", "<b>middle</b>".replace("/", ""), "right")):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(0, 120, (12, 12), dtype=np.uint8)
            image[:, 4 * c : 4 * c + 4] += 60
            Image.fromarray(image).save(folder / "pictures" / name / f"{i}.png")
    compare(
        ["ce", "kd"], "small(widths=(3, 6))", "small(widths=(4, 6), neuron=relu)", f"folder:{folder / 'pictures'}",
        epochs=2, batch=16, steps=3, lr=0.03, precision="32-true", seeds=[0, 1], jobs=0, progress=False, out=str(folder / "out"),
    )  # fmt: skip
    return folder / "out"


def figures_of(html):
    """name -> svg of each figure."""
    return dict(re.findall(r'<figure id="(\w+)">(<svg.*?</svg>)', html, re.S))


def test_a_run_has_every_figure_and_needs_nothing_else(compared, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                "report",
                str(compared / "runs" / "kd-0"),
                "--out",
                str(tmp_path / "r.html"),
                "--figures",
                str(tmp_path / "f"),
            ]
        )
    assert not stop.value.code and capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert set(figures_of(html)) >= RUN - {"disagreements"}
    assert (
        not re.findall(r'(?:src|href)="(?!#|data:)', html.replace("xlink:href", "href"))
        and "<script" not in html
        and "@import" not in html
    )
    assert "<b>middle" not in html  # a class's name is text
    names = {p.name for p in (tmp_path / "f").iterdir()}
    assert names == {f"{n}.{e}" for n in figures_of(html) for e in ("svg", "pdf")}
    result = json.loads((compared / "runs" / "kd-0" / "result.json").read_text())
    for text in (f"{result['test']['accuracy']:.2%}", "torch", "seed 0", "1 ce + 1 kd", "teacher", "int4", "precision"):
        assert text in html, text
    assert "head: its input is the mean of 36 values, of which every spike is counted" in html


def test_a_comparison_has_table_intervals_and_figures(compared):
    path = page.write(compared)
    html = path.read_text()
    assert path == compared / "report.html" and set(figures_of(html)) == COMPARE
    comparison = json.loads((compared / "compare.json").read_text())
    for text in (
        "95% interval",
        "Δ to ce",
        "No winner",
        "baseline",
        *(f"<td>{what}</td>" for what in ("processor", "system", "threads", "command")),
        *(f"{r['accuracy']:.2%}" for r in comparison["rows"]),
    ):
        assert text in html, text
    assert page.write(compared) == path  # a report may be made again


@pytest.mark.parametrize("which", ["run", "compare"])
def test_figures_are_well_formed_with_ids_and_colours_of_their_own(compared, tmp_path, which):
    html = page.write(compared if which == "compare" else compared / "runs" / "ce-1", tmp_path / "r.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", html)) <= set(ids)
    for name, svg in figures_of(html).items():
        xml.fromstring(svg)
        assert "var(--ink)" in svg and "<text" in svg, name
        assert not re.findall(r"#(?:0072b2|d55e00|1f2328)", svg), name
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+):", html))


def test_what_cannot_be_reported_is_said(compared, tmp_path):
    with pytest.raises(SpecError, match="no run folder, no comparison and no recipe"):
        page.write(tmp_path)
    half = tmp_path / "half"
    shutil.copytree(compared / "runs" / "ce-0", half)
    (half / "result.json").unlink()
    with pytest.raises(SpecError, match="not finished"):
        page.write(half)
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    with pytest.raises(SpecError, match="is not overwritten"):
        page.write(compared, mine)
    assert mine.read_text() == "my notes"


def test_a_run_whose_data_are_gone_is_reported_without_them(compared, tmp_path):
    away = tmp_path / "away"
    shutil.copytree(compared / "runs" / "ce-0", away)
    config = json.loads((away / "config.json").read_text())
    (away / "config.json").write_text(json.dumps(config | {"data": "folder:gone"}))
    html = page.write(away).read_text()
    assert set(figures_of(html)) == {"curves", "accuracy_by_step"} and "Not shown" in html and "gone" in html


def test_data_or_a_teacher_that_have_changed_are_not_shown(compared, tmp_path):
    run, images = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(compared / "runs" / "kd-0", run)
    shutil.copytree(compared.parent / "pictures", images)
    shutil.copytree(compared / "teacher", tmp_path / "teacher")
    config = json.loads((run / "config.json").read_text())
    known = json.loads((run / "result.json").read_text())["teacher_accuracy"]
    changed = config | {"data": f"folder:{images}", "teacher": str(tmp_path / "teacher")}
    (run / "config.json").write_text(json.dumps(changed))
    assert set(figures_of(page.write(run).read_text())) >= RUN - {"disagreements"}
    shutil.copy(run / "student.safetensors", tmp_path / "teacher")
    html = page.write(run).read_text()
    assert set(figures_of(html)) == {"curves", "accuracy_by_step"} and "is another one than the run" in html
    (run / "config.json").write_text(json.dumps(changed | {"teacher": config["teacher"]}))
    before = (images / "left" / "0.png").read_bytes()
    Image.new("L", (12, 12), 90).save(images / "left" / "0.png")
    html = page.write(run).read_text()
    assert set(figures_of(html)) == {"curves", "accuracy_by_step"} and "are others than the run was made with" in html
    (images / "left" / "0.png").write_bytes(before)
    assert set(figures_of(page.write(run).read_text())) >= RUN - {"disagreements"}
    shutil.copytree(images / "left", images / "aardvark")
    html = page.write(run).read_text()
    assert set(figures_of(html)) == {"curves", "accuracy_by_step"} and "aardvark" in html and "Not shown" in html
    for gone, why in (
        (str(tmp_path / "gone"), "is no run folder that is found from here"),
        ("timm:resnet18", "names no trained weights"),
        ("<Foreign>", "is no run folder that is found from here"),
    ):
        (run / "config.json").write_text(json.dumps(config | {"teacher": gone}))
        html = unescape(page.write(run).read_text())
        assert f"Without the teacher: '{gone}' {why}" in html
        assert f"<b>{known:.2%}</b><span>teacher, validation" in html
        assert "disagreements" not in figures_of(html) and "teacher, the same samples" not in html
    (run / "metrics.jsonl").write_text('{"epoch": 0, "los')
    with pytest.raises(SpecError, match=r"metrics\.jsonl' cannot be read"):
        page.write(run)


def test_a_comparison_says_what_it_does_not_show(compared, tmp_path):
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    other, out, by = tmp_path / "pictures", str(tmp_path / "both"), str(compared / "teacher")
    shutil.copytree(compared.parent / "pictures", other)
    Image.new("L", (12, 12), 90).save(other / "left" / "0.png")
    how = how_of(config) | {"epochs": 2, "seeds": [0], "jobs": 0}
    result = compare("kd", config["student"], by, f"folder:{other}", **how, out=out)
    assert result["teacher"]["accuracy"] is None and result["references"]
    (left_out,) = result["not_shown"]
    assert left_out.endswith(f"ccuracy of the teacher: '{by}' was not tested on these data with this split.")
    html = page.write(out).read_text()
    assert "was not tested on these data" in html and not re.search(r"teacher, [\d,]+ parameters", html)
    assert json.loads((compared / "compare.json").read_text())["not_shown"] == []
    (tmp_path / "both" / "runs" / "kd-0" / "metrics.jsonl").write_text('{"epoch": 0, "los')
    with pytest.raises(SpecError, match=r"metrics\.jsonl' cannot be read"):
        page.write(out)


def test_a_run_without_test_shows_validation_and_reads_nothing_else(compared, tmp_path, monkeypatch):
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    out = tmp_path / "run"
    distill(config["student"], config["teacher"], config["data"], "kd", **how_of(config), test=False, out=str(out))
    loaded = page.data_sets.load

    def without_test(*args, **how):
        return replace(loaded(*args, **how), test=None)

    data = json.loads((out / "origin.json").read_text())["data"]
    monkeypatch.setattr(page, "fingerprint", lambda _data: data)
    monkeypatch.setattr(page.data_sets, "load", without_test)
    html = page.write(out).read_text()
    samples = json.loads((out / "result.json").read_text())["valid"]["samples"]
    assert f"validation accuracy, {samples} samples" in html and f"{samples} validation samples." in html
    assert "teacher, the same samples" in html and "test samples" not in html
    assert "validation accuracy [%]" in html and "test accuracy [%]" not in html
    assert set(figures_of(html)) >= RUN - {"disagreements"}


def test_models_of_code_of_yours_are_imported_where_you_trust_it(compared, tmp_path, capsys):
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom spikedistill.models import small\n"
        "def ann(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 144, classes))\n"
        "def snn(classes, channels):\n    return small(classes=classes, channels=channels, widths=(3, 6), steps=3)\n"
    )
    ann, snn, by = f"{tmp_path / 'mine.py'}:ann", f"{tmp_path / 'mine.py'}:snn", str(tmp_path / "ann")
    distill(ann, data=config["data"], methods="ce", **how_of(config), out=by)
    for student in (config["student"], snn):
        out = tmp_path / student[-3:]
        distill(student, by, config["data"], "kd", **how_of(config), out=str(out))
        html = page.write(out).read_text()
        assert "would be imported" in html and ("Without the teacher" in html) == (student != snn)
        assert ("confusion" in figures_of(html)) == (student != snn)  # all but the teacher where the student is ours
        assert "would be imported" not in page.write(out, trust_code=True).read_text()
    result = compare(["ce", "kd"], config["student"], by, config["data"], **how_of(config) | {"epochs": 1}, seeds=[0],
        jobs=0, out=str(tmp_path / "both"))  # fmt: skip
    assert result["references"] and (tmp_path / "both" / "compare.json").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(compared), "--figures", str(tmp_path / "mine.py")])
    assert stop.value.code == 2 and "mine.py': File exists" in capsys.readouterr().err


def test_students_of_code_of_yours_are_shown_without_what_they_do_not_have(compared, tmp_path):
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom spikedistill.models import small\nfrom spikedistill.models.foreign import Spiking\n"
        "class Bare(nn.Module):\n"
        "    def __init__(self, net):\n        super().__init__()\n        self.net = net\n"
        "    def forward(self, x):\n        return self.net(x)\n"
        "def bare(classes, channels):\n    return Bare(small(classes=classes, channels=channels, widths=(3, 6), steps=3))\n"
        "class Other(nn.Module):\n    def forward(self, x):\n        return (x > 0.5).float()\n"
        "def other(classes, channels):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * 144, 6), Other(), nn.Linear(6, classes))\n"
        "    return Spiking(net, steps=3, mode='step', reset=lambda net: None)\n"
    )
    for name, lacks, words in (
        ("bare", {"accuracy_cost"}, "forward of the student takes no `steps`"),
        ("other", {"accuracy_cost", "energy", "firing_rates", "raster"}, "Energy of the student: its neurons are"),
    ):
        out = str(tmp_path / name)
        distill(f"{tmp_path / 'mine.py'}:{name}", None, config["data"], "ce", **how_of(config), out=out)
        html = page.write(out, trust_code=True).read_text()
        assert set(figures_of(html)) == RUN - lacks - {"disagreements"}
        assert "Not shown" in html and words in html
    result = compare("ce", f"{tmp_path / 'mine.py'}:other", None, config["data"], **how_of(config) | {"epochs": 1},
        seeds=[0], jobs=0, out=str(tmp_path / "both"))  # fmt: skip
    assert result["rows"][0]["energy_nj"] is None and result["references"] is None
    assert result["not_shown"][0].startswith("Energy of ce: the neurons are another library's")
    assert "are another library" in page.write(tmp_path / "both").read_text()


def test_layers_that_change_after_half_of_the_steps_are_shown_without_their_prefixes(compared, tmp_path):
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    half = "tt_snn(rank=2, mode=half, schedule=(True, True, False))"
    distill(
        config["student"], None, config["data"], "ce", **how_of(config), transform=[half], out=str(tmp_path / "run")
    )
    html = page.write(tmp_path / "run").read_text()
    assert {"confusion", "firing_rates", "accuracy_by_step"} <= figures_of(html).keys()
    assert "first t steps: layers of the student change after half" in html and "accuracy_cost" not in figures_of(html)


MINE = """
import torch
from torch import nn
import spikedistill
from spikedistill.data import from_tensors
from spikedistill.models import module, small
from spikedistill.models.layers import Conv2d, sequence
from spikedistill.neurons import LIF

def taught(classes, channels):
    return spikedistill.load(TEACHER, fast=False)

def gone(classes, channels):
    raise FileNotFoundError("weights.pt")

class Twice(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.b, self.head = Conv2d(channels, 4, 3), Conv2d(4, 4, 3), nn.Linear(4, classes)
        self.twice, self.once = LIF(v_th=0.1), LIF(v_th=0.1)
    def forward(self, x, steps=None):
        x = self.twice(self.a(sequence(x)), len(x) if x.ndim == 5 else steps or 3)
        return self.head(self.once(self.twice(self.b(x))).mean((-2, -1)))

def wrapped(classes, channels):
    return module(small(classes=classes, channels=channels, widths=(3, 6), steps=3))

def images(valid=0.1, names=("left", "middle", "right"), shape=(1, 8, 8), batch_size=16):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 3, (60, *shape), generator=draws, dtype=torch.uint8), torch.arange(60) % 3
    return from_tensors(x, y, x[:30], y[:30], classes=names, valid=valid, batch_size=batch_size)

def unheld(batch_size=16):
    return images(0, batch_size=batch_size)

def recordings(steps=3, channels=1, batch_size=16, valid=0.1):
    return images(valid, shape=(steps, channels, 8, 8), batch_size=batch_size)
"""


@pytest.fixture(scope="module")
def mine(compared, tmp_path_factory):
    """A function that trains with code of yours and returns the page, and what it found."""
    folder = tmp_path_factory.mktemp("mine")
    file = folder / "mine.py"
    file.write_text(MINE.replace("TEACHER", repr(str(compared / "teacher"))))
    before = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())

    def train(name, student=None, teacher=None, data=None, method="ce", **how):
        texts = [x.replace("mine:", f"{file}:") if x else x for x in (student or before["student"], teacher, data)]
        texts[2] = texts[2] or before["data"]
        result = distill(*texts, method, **how_of(before) | how, out=str(folder / name))
        return folder / name, result

    return train


def told(folder, trust_code=True):
    """What the page of a run says, and its figures by name; nothing is drawn."""
    seen = page.of_run(folder, trust_code)
    says = [seen["subtitle"], *(" ".join(tile) for tile in seen["tiles"])]
    drawn = {name: figure for section in seen["sections"] for name, figure in section.figures.items()}
    says += [line for section in seen["sections"] for line in (*section.says, *section.notes, section.title)]
    return "\n".join([*says, *(caption for _, caption in drawn.values())]), drawn


def texts_of(figure):
    """What is written in a figure."""
    return [text.get_text() for text in figure[0].findobj(match=lambda artist: hasattr(artist, "get_text"))]


def test_a_teacher_of_your_code_is_shown_where_it_is_trusted(mine):
    run, result = mine("taught", teacher="mine:taught", method="kd")
    text, _ = told(run)
    assert "Without the teacher" not in text and "teacher, the same samples" in text
    text, _ = told(run, trust_code=False)
    assert "Without the teacher: it is made by the code" in text and "give --trust-code" in text
    assert f"{result['teacher_accuracy']:.2%} teacher, validation" in text and "same samples" not in text
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"teacher": config["teacher"].replace("taught", "gone")}))
    assert "cannot be built: FileNotFoundError: weights.pt" in told(run)[0]
    (run / "config.json").write_text(json.dumps(config))
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps(origin | {"code": {file: "another" for file in origin["code"]}}))
    assert "is another one than the run was made with" in told(run)[0]


def test_a_neuron_that_is_used_twice_is_left_out_of_the_raster(mine):
    text, drawn = told(mine("twice", student="mine:Twice")[0])
    assert "Spikes of twice: called more than once" in text and "firing_rates" in drawn
    assert "once" in texts_of(drawn["raster"]) and "twice" not in texts_of(drawn["raster"])


@pytest.mark.parametrize(
    "how, why",
    [
        ({"student": "mine:wrapped"}, "the student takes 3 where it is asked for 1"),
        ({"steps": 1}, "the student takes one"),
        ({"encode": "bernoulli"}, ""),
        ({"data": "mine:recordings"}, ""),
    ],
)
def test_accuracy_against_cost_is_there_or_it_is_said_why_not(mine, how, why):
    run, result = mine("-".join(map(str, [*how, *how.values()])).replace(":", "_"), **how)
    text, drawn = told(run)
    assert ("accuracy_cost" in drawn) == (not why)
    assert f"Accuracy and cost of the first t steps: {why}." in text if why else "Not shown" not in text
    if not why:
        assert [text for text in texts_of(drawn["accuracy_cost"]) if "t =" in text] == ["t = 1", "t = 2", "t = 3"] * 2
        seen = page.look(run, *(json.loads((run / f"{n}.json").read_text()) for n in ("config", "result")), True)
        ours = page.energy.table(seen["activity"])[0]
        assert [p["operations"] for p in seen["prefix"]] == sorted(p["operations"] for p in seen["prefix"])
        assert seen["prefix"][-1] == {"name": "t = 3"} | {k: ours[k] for k in ("operations", "total")}
        assert seen["activity"]["operations"] == result["activity"]["operations"]


def test_streams_of_others_than_on_and_off_are_not_drawn_and_what_a_teacher_of_images_hides_is_said(mine):
    by, _ = mine("of_images", "small(widths=(3, 6), neuron=relu)", data="mine:images")
    pair = f"{by.parent / 'mine.py'}:images"
    run, result = mine("paired", "small(widths=(3, 6))", str(by), "mine:recordings", "ckd", pair=pair)
    text, drawn = told(run)
    assert "Images and events: x is [3, 16, 1, 8, 8]: a picture over time needs frames" in text
    assert f"{result['teacher_accuracy']:.2%} teacher, on its images, validation" in text
    assert "The teacher sees images, the student events" in text
    assert "streams" not in drawn and {"accuracy_cost", "energy", "raster"} <= drawn.keys()


def test_samples_are_said_to_be_of_the_part_that_they_are_of(mine):
    run, result = mine("unheld", "small(widths=(3, 6))", data="mine:unheld")
    text, _ = told(run)
    assert "valid" not in result and "samples of validation" not in text
    assert "On 30 samples of test." in text and "Operations and energy: on 30 samples of test." in text
    del result["test"]
    (run / "result.json").write_text(json.dumps(result))
    text, drawn = told(run)
    assert set(drawn) == {"curves"} and "left its test data alone" in text and "accuracy, " not in text
    page.write(run)


def test_an_ann_is_not_said_to_spike(compared):
    text, _ = told(compared / "teacher")
    assert "additions a sample" not in text and "M multiply-adds a sample" in text
    assert "T = " not in text and "Not shown" not in text
    assert "T = 3, " in told(compared / "runs" / "ce-0")[0]


def test_the_accuracy_of_another_precision_is_told_apart(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "runs" / "ce-0", run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"precision": "bf16-mixed"}))
    assert "in float32; the student's accuracy above is in bf16-mixed" in told(run)[0]


def test_names_of_classes_may_be_anything(compared, tmp_path):
    names = ["$a_{$", "\u732b" * 3, "n02085620-a-name-of-many-letters", "caf\udce9"]
    pictures = compared.parent / "pictures"
    for name, source in zip(names, ("left", "right", "right", "left")):
        shutil.copytree(pictures / source, tmp_path / "named" / name)
    config = json.loads((compared / "runs" / "kd-0" / "config.json").read_text())
    run, how = tmp_path / "run", how_of(config) | {"epochs": 1}
    distill(config["student"], None, f"folder:{tmp_path / 'named'}", "ce", **how, out=str(run))
    page.write(run, figures_to=tmp_path / "figures")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in figures_of(html)["confusion"] for name in ("$a_{$", names[1], "n02085620-a-na\u2026", "caf?"))
    assert f">{names[1]}<" in (tmp_path / "figures" / "confusion.svg").read_text(encoding="utf-8")


def test_a_frame_of_colours_is_not_drawn_brighter_than_it_is():
    x = torch.rand(4, 2, 3, 5, 5)
    torch.testing.assert_close(page.frame(x, 1), x[:, 1].mean(0))


def test_a_long_report_says_how_far_it_is(compared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "PATIENCE", -1)
    page.write(compared / "runs" / "ce-0", tmp_path / "r.html")
    assert "report: 6 of 6 samples" in capsys.readouterr().err


def how_of(config):
    names = ("epochs", "batch", "steps", "lr", "precision", "progress")
    return {name: config[name] for name in names}


PROBE = """<pre id="probe"></pre><script>
document.getElementById("probe").textContent = JSON.stringify([
  [...document.querySelectorAll("svg.figure")].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height,
    s.querySelectorAll("path, use, image").length]),
  document.documentElement.scrollWidth <= window.innerWidth, getComputedStyle(document.body).backgroundColor])
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("which", ["run", "compare"])
def test_a_browser_shows_it(compared, tmp_path, which, dark):
    """Every figure has a size and something in it, nothing is wider than the window, the console is silent."""
    path = page.write(compared if which == "compare" else compared / "runs" / "kd-0", tmp_path / "r.html")
    count = len(figures_of(path.read_text()))
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'u'}",
    ]
    command += [
        "--window-size=1000,1400",
        "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]
    done = subprocess.run([*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S).group(1))
    sizes, fits, colour = found
    assert len(sizes) == count and all(w > 200 and h > 60 and marks > 5 for w, h, marks in sizes), sizes
    assert fits and (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == dark
    picture = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={picture}", path.as_uri()], capture_output=True, timeout=120)
    assert np.asarray(Image.open(picture).convert("L")).std() > 3
