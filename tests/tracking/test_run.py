"""The run directory: its files, what a resumed run keeps, the console, the clock, wandb and the curves."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from align.errors import UserError
from align.tracking import plots
from align.tracking.metrics import Clock, speed, wilson_interval, with_std
from align.tracking.run import PACKAGES, Run, RunConfig, drop_after, environment, version
from tests.support.files import ROOT, write_rows


def start(output: Path, flags: dict | None = None, main: bool = True, total_steps: int = 10) -> Run:
    return Run(RunConfig(output), flags or {}, __file__, main, total_steps)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# --------------------------------------------------------------------------- config.json, log.txt, the script


def test_config_holds_flags_versions_commit_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--lr", "1e-5", "a b"])
    start(tmp_path / "a", {"run": {"output": tmp_path / "a"}, "lr": 1e-5, "train_data": (Path("x.jsonl"),)})
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["flags"] == {"output": str(tmp_path / "a"), "lr": 1e-5, "train_data": ["x.jsonl"]}
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(config["versions"]) == {"python", *PACKAGES}
    assert config["world_size"] == 4
    assert config["command"] == "python train.py --lr 1e-5 'a b'"
    assert (tmp_path / "a" / Path(__file__).name).read_text() == Path(__file__).read_text()


def test_commit_and_dirty_tree(tmp_path):
    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *command]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    script = tmp_path / "train.py"
    script.write_text("a = 1\n")
    git("init", "-q")
    assert environment(script)["git"] == {"commit": None, "dirty": False}
    git("add", "train.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "untracked").write_text("")
    assert environment(script)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    script.write_text("a = 2\n")
    assert environment(script)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(tmp_path / "train.py")["git"] == {"commit": None, "dirty": None}


def test_version_of_a_package_that_is_not_installed_is_none():
    assert version("no-such-package-here") is None


def test_a_resumed_run_logs_each_flag_that_changed(tmp_path, capsys):
    start(tmp_path, {"lr": 2e-5, "global_batch_size": 8, "train_data": (Path("a"),), "seed": 1})
    assert capsys.readouterr().out == ""
    run = start(tmp_path, {"lr": 1e-5, "global_batch_size": 16, "train_data": (Path("a"),), "seed": 1})
    assert capsys.readouterr().out == "--lr 1e-05 (was 2e-05)\n--global-batch-size 16 (was 8)\n"
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in log] == ["--lr 1e-05 (was 2e-05)", "--global-batch-size 16 (was 8)"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)
    for lr in (2e-5, 1e-5):  # the new flags are written once the run has been accepted
        assert json.loads((tmp_path / "config.json").read_text())["flags"]["lr"] == lr
        run.resume_at(0)


def test_output_that_is_a_file_is_refused_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    for main in (True, False):
        with pytest.raises(UserError, match=r"--output .*file is a file: give a directory"):
            start(tmp_path / "file", main=main)


def test_wandb_name_alone_is_refused():
    with pytest.raises(UserError, match="--wandb-name x needs --wandb-project"):
        RunConfig(wandb_name="x")


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    run = start(tmp_path / "a", main=False)
    run.resume_at(0)
    run.log(1, {"train/loss": 1.0})
    run.samples(1, [{"prompt": "a"}])
    run.say("hello")
    run.close()
    assert not (tmp_path / "a").exists()
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------- metrics.jsonl, samples.jsonl


def test_each_step_is_one_line_that_is_in_the_file_when_log_returns(tmp_path):
    run = start(tmp_path)
    run.resume_at(0)
    run.log(1, {"train/loss": 2.5, "train/tokens": 100})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.5, "train/tokens": 100}\n'
    run.log(2, {"train/loss": 2.25})
    assert rows(tmp_path / "metrics.jsonl")[1] == {"step": 2, "train/loss": 2.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_refused_by_name_and_not_written(tmp_path, value):
    run = start(tmp_path)
    run.resume_at(0)
    run.log(1, {"train/loss": 1.0})
    with pytest.raises(UserError, match=f"metric val/acc is {value} at step 2"):
        run.log(2, {"train/loss": 1.0, "val/acc": value})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


def test_samples_keep_any_text_on_one_line(tmp_path):
    run = start(tmp_path)
    run.resume_at(0)
    texts = ["naïve 漢字 🙂", "two\nlines\r and \u2028 more", "half a pair: \ud83d"]
    run.samples(3, [{"prompt": text, "score": 0.5} for text in texts])
    run.samples(4, [])
    assert rows(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": text, "score": 0.5} for text in texts]
    assert "漢字 🙂" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped


def test_resume_drops_later_steps_and_a_torn_line_and_continues(tmp_path):
    run = start(tmp_path)
    run.resume_at(0)
    for step in (1, 2, 3, 4):
        run.log(step, {"train/loss": 1 / step})
        run.samples(step, [{"prompt": "ä"}, {"prompt": "b"}])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "train/lo')  # torn, and its step alone would not give it away
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"step": 2, "prompt": "ä'.encode()[:-1])  # torn inside a character
    run = start(tmp_path)
    run.resume_at(2)
    run.log(3, {"train/loss": 0.25})
    losses = [(row["step"], row["train/loss"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.25)]
    prompts = [(row["step"], row["prompt"]) for row in rows(tmp_path / "samples.jsonl")]
    assert prompts == [(1, "ä"), (1, "b"), (2, "ä"), (2, "b")]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_start_mixes_nothing_with_an_earlier_run(tmp_path):
    for loss in (1.0, 2.0):
        run = start(tmp_path)
        run.resume_at(0)
        run.log(1, {"train/loss": loss})
        run.samples(1, [{"loss": loss}])
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.0}]
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1, "loss": 2.0}]


# --------------------------------------------------------------------------- the console


STEP = {"train/loss": 2.345678, "train/grad_norm": 1.5, "train/lr": 1e-5, "time/tokens_per_s": 52345.6}


def test_without_a_terminal_each_step_is_one_aligned_line(tmp_path, capsys):
    run = start(tmp_path, total_steps=100)
    run.resume_at(0)
    run.log(7, {**STEP, "train/tokens": 5.0})
    run.log(100, {**STEP, "train/loss": 12.5, "val/loss": 2.5})
    run.close(plots=False)
    assert capsys.readouterr().out == (
        "step   7/100  loss  2.3457  grad_norm    1.500  lr 1.00e-05  tokens/s    52,346\n"
        "step 100/100  loss 12.5000  grad_norm    1.500  lr 1.00e-05  tokens/s    52,346  val_loss  2.5000\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a person sees: after a return, \\x1b[K clears the line before it is written anew."""
        lines = self.getvalue().split("\n")
        assert all(part.startswith("\x1b[K") for line in lines for part in line.split("\r")[1:])
        return [line.split("\r")[-1].removeprefix("\x1b[K") for line in lines]


def open_terminal(monkeypatch, width: int) -> Terminal:
    """Not a fixture, because pytest puts its own stdout back between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    return stream


def test_on_a_terminal_a_bar_is_redrawn_and_validations_stay(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    terminal = open_terminal(monkeypatch, width=140)
    run = start(tmp_path, total_steps=10)
    run.resume_at(0)
    run.log(1, {"train/loss": 2.345678, "time/tokens_per_s": 52345.6})
    bar = "█" * 2 + "░" * 18 + " step  1/10  loss  2.3457  tokens/s    52,346  ETA ?"
    assert terminal.screen() == [bar]
    now += 60
    run.log(2, {"train/loss": 2.0, "val/loss": 2.5})
    bar = "█" * 4 + "░" * 16 + " step  2/10  loss  2.0000  val_loss  2.5000  ETA 0:08:00"
    assert terminal.screen() == ["step  2/10  loss  2.0000  val_loss  2.5000", bar]
    run.say("saved")
    assert terminal.screen() == ["step  2/10  loss  2.0000  val_loss  2.5000", "saved", bar]
    run.close(plots=False)
    assert terminal.screen() == ["step  2/10  loss  2.0000  val_loss  2.5000", "saved", bar, ""]


def test_the_eta_of_a_resumed_run_counts_its_own_steps_only(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    terminal = open_terminal(monkeypatch, width=140)
    run = start(tmp_path, total_steps=4000)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1000}\n')
    run.resume_at(1000)
    now += 500  # loading and the first step do not count
    run.log(1001, {"train/loss": 1.0})
    now += 20
    run.log(1011, {"train/loss": 1.0})  # 2 s a step, 2989 steps left
    assert terminal.screen()[0].endswith("ETA 1:39:38")


def test_a_bar_never_wraps(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch, width=40)
    run = start(tmp_path)
    run.resume_at(0)
    run.log(1, STEP)
    assert [len(line) for line in terminal.screen()] == [39]


# --------------------------------------------------------------------------- the clock


def test_shares_are_exact_sum_to_one_and_start_anew(monkeypatch):
    now = 10.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    for name, seconds in (("data", 1.0), ("train", 2.0), ("data", 0.5), ("save", 0.5)):
        now += seconds
        clock.lap(name)
    now += 0.25  # until the next lap: no time falls between two steps
    assert clock.total("data", "train") == 3.5
    expected = {"time/step": 4.0, "time/data": 0.375, "time/train": 0.5, "time/save": 0.125}
    assert clock.shares() == expected
    now += 0.75
    clock.lap("train")
    assert clock.shares() == {"time/step": 1.0, "time/train": 1.0}


def test_phases_that_did_not_come_took_no_time(monkeypatch):
    """Nor are they phases from then on: a line has the same metrics, whether their time was asked or not."""
    now = 10.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    now += 2.0
    clock.lap("generate")
    assert clock.total("generate", "meta_judge") == 2.0 and clock.total("meta_judge") == clock.total() == 0
    assert clock.shares() == {"time/step": 2.0, "time/generate": 1.0}
    assert clock.total("generate") == 0


def test_shares_of_the_real_clock_sum_to_one():
    clock = Clock()
    for name in ("data", "train", "optimizer"):
        sum(range(10000))
        clock.lap(name)
    shares = clock.shares()
    assert shares.pop("time/step") > 0
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert all(0 < share < 1 for share in shares.values())


def test_speed():
    assert speed(135_000_000, 1200, 1000, 2.0) == {"time/tokens_per_s": 600.0, "time/tflops_per_s": 0.405}


def test_wilson_interval():
    """8 of 10 trials good: (0.8 + 0.19208) / 1.38416 -+ 1.96 / 1.38416 sqrt(0.016 + 0.009604)."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson_interval(1.0, 100)[0] == pytest.approx(1 / 1.038416)
    assert wilson_interval(0.0, 100)[0] == 0.0


def test_final_line_comes_again(tmp_path):
    """A finished run that is started again evaluates its test set again."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 1.0}, {"step": 1, "test/acc": 0.5, "test/other/acc": 0.1}]
    write_rows(path, rows)
    drop_after(path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:1]


def test_with_std():
    """1, 2, 6: mean 3, mean square 41/3, variance 41/3 - 9 = 14/3."""
    metrics = with_std({"loss": 1.0, "rewards_all_square": 41 / 3, "rewards_all_mean": 3.0})
    assert metrics == {
        "loss": 1.0,
        "rewards_all_mean": 3.0,
        "rewards_all_std": pytest.approx((14 / 3) ** 0.5),
    }
    assert with_std({"x_mean": 0.1, "x_square": 0.01 - 1e-18}) == {"x_mean": 0.1, "x_std": 0.0}


# --------------------------------------------------------------------------- wandb


def read_when_it_holds(value: bytes, path: Path) -> bytes:
    """wandb's own process may write its file some milliseconds after `finish` has returned."""
    deadline = time.monotonic() + 10
    while value not in path.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.read_bytes()


def test_wandb_offline_holds_our_values_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def train(first: int) -> tuple[str, Path]:
        run = Run(RunConfig(tmp_path, "our-project", "our-name"), {"lr": 0.125}, __file__, main=True)
        run.resume_at(first)
        run.log(first + 1, {"train/loss": 3.0625 + first})
        run.samples(first + 1, [{"prompt": "a prompt", "score": 0.5}])
        directory = Path(run.wandb_run.dir).parent
        run.close(plots=False)
        return (tmp_path / "wandb_id.txt").read_text().strip(), directory

    first_id, first = train(0)
    assert first.parent == tmp_path / "wandb"
    for value in (b"our-project", b"our-name", b"train/loss", b"3.0625", b"0.125", first_id.encode()):
        assert value in read_when_it_holds(value, next(first.glob("*.wandb")))
    tables = list(first.glob("files/media/table/*.json"))
    assert [json.loads(table.read_text())["data"] for table in tables] == [[["a prompt", 0.5]]]
    second_id, second = train(1)
    assert second_id == first_id and first_id in second.name
    assert b"4.0625" in read_when_it_holds(b"4.0625", next(second.glob("*.wandb")))
    third_id, _ = train(0)  # a fresh start is a new wandb run
    assert third_id != first_id


# --------------------------------------------------------------------------- curves


def write_metrics(directory: Path, num_steps: int) -> None:
    directory.mkdir(exist_ok=True)
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            row = {"step": step, "time/step": 0.5, "rollout/reward": 0.1, "train/loss": 1 / step}
            row |= {"train/lr": 1e-5} | ({"val/loss": 2 / step} if step % 5 == 0 else {})
            file.write(json.dumps(row) + "\n")


def test_train_and_val_share_a_panel_and_come_first(tmp_path):
    write_metrics(tmp_path, 10)
    panels = plots.arrange(plots.read_curves(tmp_path / "metrics.jsonl"))
    assert list(panels) == ["loss", "lr", "rollout/reward", "time/step"]
    assert list(panels["loss"]) == ["train/loss", "val/loss"]
    assert panels["loss"]["val/loss"] == ([5, 10], [0.4, 0.2])


def test_moving_average_by_hand():
    assert plots.moving_average([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


@pytest.mark.parametrize("num_steps", [1, 7, 120])
def test_close_draws_the_curves(tmp_path, capsys, num_steps):
    run = start(tmp_path)
    run.resume_at(0)
    write_metrics(tmp_path, num_steps)
    run.close()
    path = tmp_path / "plots/curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"curves: {path}\n"


def test_a_run_without_steps_has_no_curves(tmp_path):
    run = start(tmp_path)
    run.resume_at(0)
    run.close()
    assert not (tmp_path / "plots").exists()


def test_long_noisy_curves_are_smoothed_and_short_ones_are_not(tmp_path):
    from matplotlib.figure import Figure

    steps = list(range(100))
    values = [float(step % 2) for step in steps]
    for name, num_steps, num_lines in (("train/loss", 100, 2), ("train/loss", 50, 1), ("train/lr", 100, 1)):
        axis = Figure().subplots()
        plots.draw_panel(axis, "panel", {name: (steps[:num_steps], values[:num_steps])})
        assert len(axis.lines) == num_lines
        assert list(axis.lines[0].get_ydata()) == values[:num_steps]
    axis = Figure().subplots()
    plots.draw_panel(axis, "loss", {"train/loss": (steps, values), "val/loss": (steps, values)})
    assert [line.get_marker() for line in axis.lines] == ["None", "", "o"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train", "val"]


def test_plot_script_redraws_from_the_command_line(tmp_path):
    for name in ("a", "b"):
        write_metrics(tmp_path / name, 3)
    command = [sys.executable, "-m", "tools.plots", str(tmp_path / "a"), str(tmp_path / "b")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(tmp_path / name / "plots/curves.png") for name in ("a", "b")]
    assert (tmp_path / "b/plots/curves.png").exists()


def test_plot_of_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: give the --output directory"):
        plots.draw(tmp_path)
