"""The report of a run and of a comparison: what is in it, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace

import numpy as np
import pytest
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
    for gone in (str(tmp_path / "gone"), "timm:resnet18"):
        (run / "config.json").write_text(json.dumps(config | {"teacher": gone}))
        html = page.write(run).read_text()
        assert f"'{gone}' is no run folder that is found from here" in html.replace("&#39;", "'")
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
    assert result["not_shown"] == [f"Accuracy of the teacher: '{by}' was not tested on these data with this split."]
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
    assert {"confusion", "firing_rates", "accuracy_by_step"} <= figures_of(html).keys() and "Not shown" not in html


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
