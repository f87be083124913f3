"""Figures, records and reports of notebook 3, from given numbers and with honest labels."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cpkit.control.messages import Array, ClockResult, Workload
from cpkit.notebook import style
from cpkit_lessons import figures, machine, performance, published, recordings, report
from cpkit_lessons.mistakes import Mistake, noisy_neighbour

SIZES = (1 << 16, 1 << 20, 1 << 24)
LIGHT = {size: 1.0 + size * 1e-4 for size in SIZES}


def sweep(cp_size: int = 4) -> pd.DataFrame:
    rows = [
        {
            "size_bytes": size,
            "cp_size": cp_size,
            "algorithm": name,
            "time_us": factor * LIGHT[size],
            "p95_us": 2.0 * factor * LIGHT[size],
            "iterations": 7,
        }
        for name, factor in (("padded", 12.0), ("direct", 2.0))
        for size in SIZES
    ]
    return pd.DataFrame(rows)


def recording(
    folder: Path, device: str, name: str = "2026-01-02", cp_size: int = 4, gpus: int = 0
) -> Path:
    row = {"variant": "direct", "cp_size": cp_size, "size_bytes": SIZES[0], "time_us": 3.0}
    where = {"device": device, "processor": "a processor", "cores": 2, "date": name, "commit": "c"}
    where["gpus"] = [device] * gpus
    path = folder / f"{name}-{'cpu' if device == 'cpu' else 'gpu'}.json"
    path.write_text(
        json.dumps(
            {
                "environment": where,
                "gather": [row, {**row, "variant": "plan"}, {"variant": "no time"}],
            }
        )
    )
    return path


# ------------------------------------------------------------------------- figures


def test_the_roof_stays_when_points_are_added() -> None:
    before, after = figures.roof(LIGHT), figures.roof(LIGHT, sweep(), ("direct", 2.0, 2e-4))
    light = [next(t for t in f.data if t.name == "speed of light") for f in (before, after)]
    assert list(light[0].y) == list(light[1].y) == [LIGHT[size] for size in SIZES]
    assert {"padded", "direct", "direct: alpha + beta · bytes"} <= {t.name for t in after.data}
    words = figures.text_alternative(after)
    assert "padded takes 12.0 times that. direct takes 2.0 times that" in words
    assert "2 µs + bytes / 5.00 GB/s" in words


def test_damage_shows_each_factor_and_its_samples() -> None:
    found = {
        "flatters": Mistake(10.0, 5.0, [9.0, 11.0]),
        "slanders": Mistake(10.0, 30.0, [10.0]),
    }
    figure = figures.damage(found)
    reported = next(trace for trace in figure.data if trace.name == "reported with the mistake")
    assert list(reported.x) == [0.5, 3.0]
    assert list(figure.data[0].x) == [0.9, 1.1], "samples by the right time"


def test_a_noisy_neighbour_runs_threads_and_ends_them() -> None:
    before = threading.active_count()
    with noisy_neighbour(2):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


# ------------------------------------------------------------------------- records


def test_recordings_describe_their_machine_and_what_is_missing(tmp_path: Path) -> None:
    recording(tmp_path, "cpu", name="2026-01-01")
    recording(tmp_path, "cpu", name="2026-01-02")
    (tmp_path / "notes.json").write_text('{"something": "else"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    found = recordings.read(tmp_path)
    assert [each.name for each in found] == ["2026-01-01-cpu.json", "2026-01-02-cpu.json"]
    assert "a processor, 2 cores, 2026-01-02, commit c, cp_size 4" in recordings.describe(found)
    assert "missing: a run on GPUs" in recordings.describe(found)
    recording(tmp_path, "NVIDIA H200", name="2026-01-03")
    found = recordings.read(tmp_path)
    assert "missing" not in recordings.describe(found)
    assert [each.machine for each in recordings.newest(found, 4)] == [
        "a processor, 2 cores",
        "NVIDIA H200",
    ]
    assert recordings.newest(found, 8) == []


def test_the_record_beside_yours_has_a_gpu_per_rank_or_the_most_gpus(tmp_path: Path) -> None:
    chosen = []
    for day, gpus in enumerate((2, 1, 8, 4, 1)):
        recording(tmp_path, "NVIDIA H200", name=f"2026-01-0{day + 3}", gpus=gpus)
        chosen.append(recordings.newest(recordings.read(tmp_path), 4)[-1].gpus)
    assert chosen == [2, 2, 8, 4, 4]


def test_recorded_times_are_never_shown_as_measured_here(tmp_path: Path) -> None:
    recording(tmp_path, "NVIDIA H200")
    (found,) = recordings.read(tmp_path)
    figure = recordings.beside(sweep(), found, 4)
    assert figure.layout.title.text == "Recorded: times with cp_size 4, beside yours"
    assert (
        "Recorded on NVIDIA H200, 2026-01-02 (2026-01-02-gpu.json)"
        in figure.layout.title.subtitle.text
    )
    marks = {trace.name: trace.marker.symbol for trace in figure.data}
    assert len(marks) == len(figure.data), "each line once"
    assert marks["direct, recorded"] == "circle-open"
    assert marks["direct, yours"] == "circle"
    with pytest.raises(ValueError, match=r"has no cp_size 8; it has \[4\]"):
        recordings.beside(sweep(), found, 8)


def test_a_gpu_record_includes_its_floor(tmp_path: Path) -> None:
    path = recording(tmp_path, "NVIDIA H200")
    content = json.loads(path.read_text())
    content["gather"] = [{**row, "floor_us": 2.0} for row in content["gather"]]
    path.write_text(json.dumps({**content, "sharing": "MPS"}))
    (found,) = recordings.read(tmp_path)
    assert found.machine == "NVIDIA H200, shared by all ranks"
    names = {trace.name for trace in recordings.beside(sweep(), found, 4).data}
    assert {"direct, recorded", "floor, recorded"} <= names


def test_copies_to_all_peers_are_no_bound_on_four_gpus() -> None:
    record = next(each for each in recordings.read() if each.name == "2026-11-26-gpu-4.json")
    names = {trace.name for trace in recordings.beside(sweep(), record, 4).data}
    assert "copies to all peers, recorded" in names
    assert "floor, recorded" not in names
    direct = record.table[record.table["variant"] == "direct"].set_index("size_bytes")
    large = direct.loc[[67_102_720, 268_429_312]]
    assert (large["time_us"] < large["floor_us"]).all(), "as the text of notebook 3 says"


def test_the_committed_records_can_be_read() -> None:
    found = recordings.read()
    assert found, "benchmarks/results holds at least one run"
    assert all(each.environment["date"] and each.machine for each in found)


def test_published_times_fit_the_stated_line() -> None:
    table = published.SYMMETRIC
    alpha_us, us_per_byte = performance.fit_line(table.sizes_bytes, table.symmetric_us)
    assert alpha_us == pytest.approx(5.3, abs=0.05)
    assert 7 / 8 * 1e-3 / us_per_byte == pytest.approx(328, abs=1)
    for ring_us, symmetric_us, speedup in zip(
        table.ring_us, table.symmetric_us, table.speedups, strict=True
    ):
        assert ring_us / symmetric_us == pytest.approx(speedup, abs=0.01)


def test_numbers_of_two_h100s_in_the_text_are_those_of_the_record() -> None:
    record = next(each for each in recordings.read() if each.name == "2026-11-28-gpu.json")
    assert record.environment["commit"] == "6b142c512aef"
    us = record.table.pivot_table(index="size_bytes", columns="variant", values="time_us")
    largest = us.loc[268429312]
    assert largest[["peer copies", "plan", "NCCL recv"]].round().tolist() == [350, 378, 451]
    assert largest[["NCCL both", "NCCL"]].round().tolist() == [596, 556]
    assert round(268429312 / 2 / largest["peer copies"] / 1e3) == 383
    assert round(largest["seed"]) == 1067
    assert round(largest["seed"] - largest["NCCL"]) == 511
    gains = (us["NCCL"] / us["NCCL both"]).round(2)
    assert gains[[256000, 4188160, 67102720, 268429312]].tolist() == [0.92, 1.48, 1.03, 0.93]
    assert (us["seed"] / us["plan"]).round(1).between(1.9, 2.8).all()
    small = record.table[(record.table["size_bytes"] == 256000)].set_index("variant")
    assert small.loc["seed", ["call_us", "time_us"]].round(1).tolist() == [242.4, 13.9]
    at_2_mb = record.table[(record.table["size_bytes"] == 2091008)].set_index("variant")
    device_us, call_us = at_2_mb["time_us"].round(1), at_2_mb["call_us"]
    found = device_us[["seed", "padded_symm", "NCCL", "NCCL both"]].tolist()
    assert found == [25.2, 21.1, 20.5, 16.7]
    answer = performance.LESSON.predictions["clocks"].answer
    assert round(device_us["padded_symm"] / device_us["seed"], 2) == answer
    beside = {each["variant"]: each for each in record.beside.to_dict("records")}
    assert round(call_us["padded_symm"] / call_us["seed"], 1) == 2.1
    columns = ("time_us", "beside_us", "delay_us")
    found = {name: [round(beside[name][column]) for column in columns] for name in beside}
    assert (found["plan"], found["copy engine"]) == ([103, 262, 102], [234, 639, 126])
    assert (found["peer copies"][:2], found["seed"][2]) == ([92, 93], 243)
    shown = ("seed", "NCCL", "NCCL both", "copy engine", "direct", "plan")
    assert max(shown, key=lambda name: beside[name]["delay_us"]) == "seed"


# ------------------------------------------------------------------------- report

STATUS = SimpleNamespace(
    version="1", torch_version="2", device="cpu", world_size=4, symmetric_backend="POSIX"
)


def test_a_report_has_all_that_is_needed_to_repeat_it(tmp_path: Path) -> None:
    page, data = report.write(
        tmp_path / "new" / "folder",
        STATUS,
        sweep(),
        repeat="lab.sweep(sizes_bytes=[1 < 2])",
        results={"alpha_us": 12.5},
        figures=[figures.roof(LIGHT)],
    )
    content = json.loads(data.read_text())
    assert {"date", "commit", "torch", "processor", "cores", "device", "ranks"} <= set(
        content["environment"]
    )
    assert content["results"] == {"alpha_us": 12.5}
    pd.testing.assert_frame_equal(pd.DataFrame(content["sweep"]), sweep())
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "lab.sweep(sizes_bytes=[1 &lt; 2])" in text
    assert json.loads(unescape(text.split("<pre>")[-1].split("</pre>")[0])) == content


def test_a_report_without_a_browser_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    roofs = [figures.roof(LIGHT), figures.roof(LIGHT)]
    page, _ = report.write(tmp_path, STATUS, sweep(), repeat="", results={}, figures=roofs)
    said = capfd.readouterr()
    assert said.err == "", "stderr is a red box in a notebook"
    (line,) = said.out.splitlines()
    assert "no pictures" in line
    assert "apt-get install chromium" in line
    assert page.read_text().count("apt-get install chromium") == 2
    assert unescape(page.read_text()).count(style.text_alternative(roofs[0])) == 2


def test_a_report_shows_that_its_figure_is_being_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "png", lambda _: time.sleep(1.2) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(
            tmp_path, STATUS, sweep(), repeat="", results={}, figures=[figures.roof(LIGHT)]
        )
    assert capfd.readouterr().out == "a browser draws the figure, 1 s …\n"


def test_a_report_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="pass a folder that you can write to"):
        report.write(tmp_path / "file", STATUS, sweep(), repeat="", results={})


def test_a_report_without_spread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks \['p95_us'\]"):
        report.write(tmp_path, STATUS, sweep().drop(columns="p95_us"), repeat="", results={})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- samples


def test_clocked_times_are_of_the_slowest_rank() -> None:
    spans = np.zeros((2, 3, 2, 2))  # calls, iterations, ranks, (begin, end)
    spans[0, :, :, 1] = [[1, 5], [7, 2], [3, 3]]
    spans[1, :, :, 0], spans[1, :, :, 1] = 10, 12
    no_gpu = Array.of(np.empty((2, 0, 2)))
    clocked = ClockResult(Workload(2, (8,)), ("direct", "direct#2"), Array.of(spans), no_gpu)
    assert clocked.calls == ("direct", "direct#2")
    assert clocked.slowest_us("direct").tolist() == [5, 7, 3]
    assert clocked.median_us("direct") == 5
    assert clocked.begin_us("direct#2").tolist() == [[10, 10]] * 3
    assert clocked.table.loc[0, ["time_us", "min_us", "iterations"]].tolist() == [5, 3, 3]


def test_the_modelled_time_counts_the_bytes_written() -> None:
    rows = {"pad": 3, "wire": 12, "strip": 10}
    assert performance.price(rows, 10, 5.0, 20.0, 1.0) == 2 + 1.5 + 24 + 5


def test_the_recorded_commit_is_that_of_cpkits_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed cpkit can be inside another project's checkout, which has its own commits."""
    installed = tmp_path / "project" / "cpkit_lessons" / "machine.py"
    installed.parent.mkdir(parents=True)
    shutil.copyfile(machine.__file__, installed)
    other = ["git", "-C", str(installed.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "machine.py"], ["commit", "-qm", "other"]):
        subprocess.run([*other, *command], check=True)
    assert runpy.run_path(str(installed))["commit"]() == ""
    own = machine.commit()
    monkeypatch.setenv("GIT_DIR", str(installed.parent / ".git"))  # as in a hook of that project
    assert machine.commit() == own
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert machine.commit() == ""
