"""benchmarks/gpu.py: what stops a section stops nothing else, and loses nothing."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.paths import ROOT
from helpers.tiers import rest

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu = importlib.import_module("gpu")
gpu_op = importlib.import_module("gpu_op")
gpu_training = importlib.import_module("gpu_training")
gpu_wheels = importlib.import_module("gpu_wheels")

TOY_BUDGET = 400
# Sections that a test can wait for.
MADE = """
import os, subprocess, sys, time
from pathlib import Path
import gpu

def quick(note):
    note("answer", 42)
    note("a row", {"ms": 1.5, "tokens": [1, 2]})

def raises(note):
    note("before", 1)
    raise ValueError("the reason")

def dies(note):
    note("before", 2)
    os.kill(os.getpid(), 9)

def slow(note):
    started = subprocess.Popen(["sleep", "300"])
    note("processes", [os.getpid(), started.pid])
    time.sleep(300)

def main():
    names, out, budget = sys.argv[1:]
    sections = {n: gpu.Section(f"made:{n}", 1, n) for n in names.split(",")}
    gpu.run(sections, list(sections), Path(out), float(budget))
"""


def environment(*folders):
    search = map(str, [*folders, BENCHMARKS, ROOT])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search)}


@pytest.fixture
def start(tmp_path):
    """Starts a run of sections of MADE; `gpu.json` is then in `tmp_path`."""
    (tmp_path / "made.py").write_text(MADE)

    def run(names, budget=60.0):
        command = [sys.executable, "-c", "import made; made.main()"]
        return subprocess.Popen(
            [*command, names, str(tmp_path), str(budget)],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )

    return run


def results(folder):
    """Sections and text of a run."""
    found = json.loads((folder / "gpu.json").read_text())
    return found["sections"], (folder / "gpu.md").read_text()


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@rest
def test_a_section_that_fails_is_recorded_and_the_next_one_runs(start, tmp_path):
    output = start("raises,dies,quick").communicate()[0]
    sections, text = results(tmp_path)
    raised, died, quick = sections.values()
    assert raised["status"] == "failed" and raised["found"] == {"before": 1}
    assert raised["reason"] == "ValueError: the reason"
    assert raised["traceback"][-1] == "ValueError: the reason"
    assert died["status"] == "failed" and died["found"] == {"before": 2}
    assert died["reason"] == "its process ended with -9"
    assert quick["status"] == "done"
    assert quick["found"] == {"answer": 42, "a row": {"ms": 1.5, "tokens": [1, 2]}}
    assert "Failed: ValueError: the reason. " in text
    assert "- answer: 42" in text
    assert "|  | ms | tokens |\n| --- | --- | --- |\n| a row | 1.5 | 1, 2 |" in text
    assert "raises: failed" in output and "answer: 42" in output


@rest
def test_a_section_that_is_longer_than_the_budget_is_stopped(start, tmp_path):
    began = time.monotonic()
    assert start("slow,quick", budget=25).wait() == 0
    assert time.monotonic() - began < 25
    sections, text = results(tmp_path)
    slow, quick = sections.values()
    assert slow["status"] == "stopped"
    assert "the budget ended after" in slow["reason"]
    assert all(map(is_gone, slow["found"]["processes"]))
    assert quick["status"] == "no time" and "found" not in quick
    assert (
        "### quick\n\nNot measured: no time: it needs about 1 s, and 0 s were" in text
    )


def test_a_section_that_needs_more_than_is_left_does_not_start(monkeypatch):
    section = gpu.Section("made:quick", 70, "quick", needs_gpu=True)
    monkeypatch.setattr(gpu, "ON_GPU", True)
    assert gpu.unrun("quick", section, ["quick"], 70.0) == {}
    assert gpu.unrun("quick", section, ["quick"], 69.4) == {
        "status": "no time",
        "reason": "it needs about 70 s, and 69 s were left",
    }
    assert gpu.unrun("quick", section, ["slow"], 70.0) == {"status": "not asked for"}
    monkeypatch.setattr(gpu, "ON_GPU", False)
    assert gpu.unrun("quick", section, ["quick"], 70.0) == {"status": "needs a GPU"}


@rest
def test_a_run_that_is_killed_has_left_what_it_found(start, tmp_path):
    process = start("quick,slow")
    path = tmp_path / "gpu.md"
    wait_until(lambda: path.exists() and "processes" in path.read_text())
    process.kill()
    process.wait()
    sections, text = results(tmp_path)
    assert sections["quick"]["found"]["answer"] == 42
    assert sections["slow"]["status"] == "running"
    assert "- answer: 42" in text and "### slow\n\nRunning. " in text
    started = sections["slow"]["found"]["processes"]
    assert len(started) == 2
    wait_until(lambda: all(map(is_gone, started)))


# --- toy sizes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The whole of it on a CPU: results, text, and seconds it took."""
    if torch.cuda.is_available():
        pytest.skip("toy sizes are those of a machine without a GPU")
    out = tmp_path_factory.mktemp("toy")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out)]
    began = time.monotonic()
    subprocess.run(
        [*command, "--budget", str(TOY_BUDGET)],
        env={**environment(), "EDPO_COMMIT": "abc1234"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads((out / "gpu.json").read_text()), time.monotonic() - began


@rest
def test_at_toy_sizes_every_section_runs_or_needs_a_gpu(toy):
    found, seconds = toy
    assert seconds < TOY_BUDGET
    assert list(found["sections"]) == list(gpu.SECTIONS)
    states = {name: entry["status"] for name, entry in found["sections"].items()}
    needs_gpu = dict.fromkeys(("sanitizer", "sync"), "needs a GPU")
    assert states == {**dict.fromkeys(gpu.SECTIONS, "done"), **needs_gpu}
    assert found["about"]["commit"] == "abc1234"
    torch_version = found["about"]["versions"]["torch"]
    assert torch_version.split("+")[0] == torch.__version__.split("+")[0]
    text = gpu.markdown(found)
    assert "Toy sizes: no speed follows from them." in text
    assert "### sync\n\nNot measured: needs a GPU." in text


@rest
def test_the_head_is_right_at_toy_sizes(toy):
    numbers = toy[0]["sections"]["numbers"]["found"]
    rows = [value for name, value in numbers.items() if name.startswith("distance")]
    assert len(rows) == 3
    for row in rows:
        assert row["equal steps"] == 1.0
        assert row["policy_logp"] < 1e-5 and row["plus"] < 1e-3
        assert row["gradient"] < 0.01  # bfloat16
    assert numbers["equal models, not exactly 0 at (tokens, offset)"] == ["nowhere"]
    for how in ("kept", "formed again"):
        name = f"weight gradient of a trained head, numerators {how}, relative error"
        assert numbers[name] < 0.01
    drifts = [name for name in numbers if name.startswith("drift")]
    assert len(drifts) == 5


@rest
def test_all_contenders_train_the_same_from_the_same_start(toy):
    found = toy[0]["sections"]["train"]["found"]
    rows = {name: row for name, row in found.items() if isinstance(row, dict)}
    assert found["shared, FlashAttention"] == "needs a GPU"
    assert found["dpo"] == found["padded"] == "left out at toy sizes"
    assert {"shared", "cached", "shared, LoRA"} <= rows.keys()
    for name, row in rows.items():
        assert row["loss of step 1"] == pytest.approx(math.log(2), abs=1e-4), name
        assert row["β moved in step 1"] == ("-" if "dpo" in name else 0.0), name
        assert 0 < row["s/step"] and 0 < row["peak GiB"] < 8, name
    assert rows["cached"]["cache, s"] > 0 == rows["shared"]["cache, s"]


@rest
def test_attention_of_a_packed_row_is_what_sdpa_says(toy):
    found = toy[0]["sections"]["attention"]["found"]
    rows = {name: row for name, row in found.items() if isinstance(row, dict)}
    assert "ours, `sdpa`" in rows and len(rows) == 3
    for name, row in rows.items():
        assert 0 < row["error"] < 0.01 and len(row["new lengths, ms"]) == 3, name
        assert row["error of the queries' gradient"] < 0.02, name


def test_what_the_sections_compare_with_is_the_definition():
    """Two words, one token, by hand."""
    policy, reference = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    weight, y = torch.eye(2, dtype=torch.float64), torch.tensor([0])
    row = gpu_op.exact_rows(policy.double(), reference.double(), weight, y)
    p = 1 / (1 + math.exp(-1))

    def logp(difference):
        return -math.log1p(math.exp(-difference))

    assert row["policy_logp"].item() == pytest.approx(logp(1))
    assert row["reference_logp"].item() == pytest.approx(-math.log(2))
    assert row["plus"].item() == pytest.approx(logp(1.01) - logp(1))
    assert row["minus"].item() == pytest.approx(logp(0.99) - logp(1))
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert row["kl"].item() == pytest.approx(kl)
    assert row["gradient"][0].tolist() == pytest.approx([1 - p, p - 1])


def test_steps_are_signs_that_both_sides_agree_on():
    plus = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0, 0.0])
    assert gpu_op.steps(plus, -plus, length=1).tolist() == [1, -1, 1]
    assert gpu_op.steps(plus, plus, length=1).tolist() == [0, 0, 0]


def test_a_program_that_takes_too_long_is_stopped_with_what_it_started():
    command = ["sh", "-c", "sleep 300 & echo $!; wait"]
    code, lines = gpu_op.output_of(command, 1.0)
    assert code is None and len(lines) == 1
    wait_until(lambda: is_gone(int(lines[0])))
    assert gpu_op.output_of(["sh", "-c", "echo told; exit 3"], 60) == (3, ["told"])


def test_a_gpu_is_busy_where_any_kernel_runs():
    assert gpu_training.busy([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4


def test_places_that_wait_for_the_gpu_are_counted_by_their_stack():
    auditor = gpu_training.Auditor({})
    for message in (gpu_training.WARNING, gpu_training.WARNING, "something else"):
        auditor._notice(message, UserWarning, "a.py", 1)
    ((where, count),) = auditor._places.items()
    assert count == 2
    own = "test_places_that_wait_for_the_gpu_are_counted_by_their_stack"
    assert where.endswith(f" {own}")


# --- results and options ----------------------------------------------------------


def finished(path, device="NVIDIA H100", **sections):
    about = {"date": "2026-11-26", "device": device, "gpu": True, "commit": "abc1234"}
    about |= {"versions": {"torch": "2.11.0", "triton": "3.6.0"}, "wheels": "none"}
    path.write_text(json.dumps({"about": about, "sections": sections}))
    return path


def done(**found):
    return {"status": "done", "seconds": 3.2, "found": found}


@pytest.fixture
def record(monkeypatch):
    """Records finished runs, as the command line does."""

    def run(into, *files):
        words = ["gpu.py", "--into", str(into), "--record", *map(str, files)]
        monkeypatch.setattr(sys, "argv", words)
        gpu.main()

    return run


def test_a_record_is_written_and_replaced(record, tmp_path):
    into = tmp_path / "RESULTS.md"
    into.write_text("# Benchmark results\n\n## Another\n\nstays\n")
    waiting = {"status": "no time", "reason": "it needs about 70 s, and 9 s were left"}
    probed = done(**{"copy, TB/s": 3.0123456})
    file = finished(tmp_path / "gpu.json", probe=probed, sync=waiting)
    record(into, file)
    text = into.read_text()
    assert text.startswith("# Benchmark results\n\n## Another\n\nstays\n\n")
    assert "## GPU run, NVIDIA H100\n\n2026-11-26, NVIDIA H100, torch 2.11.0" in text
    assert "triton 3.6.0, commit abc1234" in text
    assert "### probe\n\n3 s.\n\n- copy, TB/s: 3.012" in text
    assert "### sync\n\nNot measured: no time: it needs about 70 s, and 9 s" in text
    # the second run had time for what the first had not, and did not ask for the other
    second = finished(
        tmp_path / "second.json",
        probe={"status": "not asked for"},
        sync=done(**{"waits for the GPU": 7}),
    )
    record(into, file, second)
    text = into.read_text()
    assert text.count("## GPU run") == text.count("## Another") == 1
    assert "- copy, TB/s: 3.012" in text and "- waits for the GPU: 7" in text
    assert "Not measured" not in text


def test_runs_of_two_devices_and_those_of_a_cpu_are_not_recorded(tmp_path):
    one = finished(tmp_path / "one.json", probe=done(a=1))
    other = finished(tmp_path / "other.json", device="NVIDIA H200", probe=done(a=1))
    with pytest.raises(ValueError, match="the runs differ in device, commit, versions"):
        gpu.merged([one, other])
    content = json.loads(one.read_text())
    content["about"]["gpu"] = False
    one.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="toy sizes on a CPU is no result"):
        gpu.merged([one])


def test_an_unknown_section_is_refused_and_the_known_ones_are_named(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "probe,speed"])
    with pytest.raises(SystemExit):
        gpu.main()
    told = capsys.readouterr().err
    assert "speed: none of probe, numbers, tests, head, attention, sanitizer" in told


# --- a machine without network ----------------------------------------------------


def test_more_than_can_travel_is_refused_and_the_biggest_are_named(tmp_path):
    paths = [tmp_path / f"{name}.whl" for name in "abcd"]
    for megabytes, path in enumerate(paths, start=1):
        path.write_bytes(bytes(megabytes * 2**20))
    assert gpu_wheels.check_size(paths, limit=10 * 2**20) == 10 * 2**20
    with pytest.raises(ValueError) as refused:
        gpu_wheels.check_size(paths, limit=10 * 2**20 - 1)
    assert str(refused.value) == (
        "10.0 MiB of wheels and tracked files are more than 10.0 MiB; the biggest: "
        "d.whl 4.0 MiB, c.whl 3.0 MiB, b.whl 2.0 MiB"
    )


STAND_INS = BENCHMARKS / "stand_ins"
FLASH = """
import importlib.metadata, torch, flash_attn, wandb
from flash_attn.bert_padding import pad_input, unpad_input
assert importlib.metadata.version("flash-attn") == "2.8.3"
# by this transformers knows that it is there
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
grid = torch.arange(12.0).view(2, 3, 2)
mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
rows, where, starts, longest, lengths = unpad_input(grid, mask)
assert rows.tolist() == [[0, 1], [2, 3], [6, 7], [8, 9], [10, 11]]
assert (starts.tolist(), longest, lengths.tolist()) == ([0, 2, 5], 3, [2, 3])
assert torch.equal(pad_input(rows, where, 2, 3), grid * mask[..., None])
q, k = (torch.empty(2, n, h, 64, dtype=torch.bfloat16, device="meta")
        for n, h in ((3, 8), (5, 2)))
assert flash_attn.flash_attn_func(q, k, k, causal=True).shape == q.shape
try:
    flash_attn.flash_attn_func(q, k, k, softcap=30.0)
except NotImplementedError as error:
    print(error)
assert wandb.run is None and wandb.Table
"""


def test_the_stand_ins_are_taken_for_what_they_stand_for():
    folders = [STAND_INS / "flash_attn", STAND_INS / "wandb"]
    run = subprocess.run(
        [sys.executable, "-c", FLASH],
        env=environment(*folders),
        capture_output=True,
        text=True,
    )
    assert run.stdout == "torch's kernels have no softcap\n", run.stderr


def test_stand_ins_are_found_only_where_the_real_ones_are_missing(monkeypatch):
    def missing(*names):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            gpu.importlib.util,
            "find_spec",
            lambda name: None if name in names else found(name),
        )
        return [Path(path).name for path in gpu.search_path() if "stand_ins" in path]

    assert "wandb" not in missing()
    assert missing("wandb", "flash_attn") == ["wandb", "flash_attn"]
