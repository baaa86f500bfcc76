import importlib.util
import json
import subprocess
import sys

import pytest

from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.train import run
from tests.cifar_core.training import make_trainer
from tests.conftest import REPOSITORY


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    specification = importlib.util.spec_from_file_location("timing", REPOSITORY / "benchmarks/time_to_accuracy.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "timing", module)
    specification.loader.exec_module(module)
    return module


def marked(*marks):
    return [(seconds, json.dumps({"mark": what, **values})) for seconds, what, values in marks]


def test_the_time_of_the_script_is_that_of_training_without_evaluations(timing):
    lines = marked(
        (2, "training", {}),  # the warm-up on a GPU
        (3, "evaluating", {}),
        (4, "evaluated", {"accuracy": 0.1, "level": 0}),
        (10, "training", {}),
        (15, "evaluating", {}),
        (17, "evaluated", {"accuracy": 0.8, "level": 0}),
        (23, "evaluating", {}),
        (26, "evaluated", {"accuracy": 0.9, "level": 0}),
        (27, "evaluating", {}),
        (29, "evaluated", {"accuracy": 0.91, "level": 2}),
        (30, "finished", {"parameters": 7}),
    )
    lines.insert(3, (4.5, "| epoch | accuracy |"))
    assert timing.script_values([timing.Timed(31, lines)]) == {
        "parameters": 7,
        "epochs": [(5, 0.8), (11, 0.9)],
        "accuracy": 0.9,
        "accuracy_six_views": 0.91,
        "train_seconds": 11,
        "seconds_to_study": 11,
    }


def test_the_lines_of_a_training_and_its_files_give_the_measurements(timing, small, tmp_path, capsys):
    trainer = make_trainer(small, tmp_path, "sprint", ["epochs=2", "batch_size=90"])
    run(trainer, resume=False)
    (tmp_path / "test.json").write_text('{"accuracy": 0.5}')
    lines = [(float(number), line) for number, line in enumerate(capsys.readouterr().out.splitlines())]
    history = [line | {"validation_accuracy": 0.9 * (line["epoch"] == 2)} for line in trainer.state.history]
    trainer.folder.write_history(history)
    ended = [timing.Timed(50, lines), timing.Timed(3, [])]
    measured = timing.training_values(get_recipe("sprint"), RunFolder(tmp_path), ended)
    last = next(seconds for seconds, line in lines if line.startswith("epoch  2/2"))
    assert measured == {
        "accuracy": 0.5,
        "validation_accuracy": 0.9,
        "train_seconds": 50,
        "evaluate_seconds": 3,
        "seconds_to_study": last,
    }


def test_what_is_finished_is_kept_when_another_run_fails_and_is_not_run_again(timing, tmp_path):
    flag = tmp_path / "flag"

    def made(name, code):
        def values(ended):
            return {"lines": [line for _, line in ended[0].lines]}

        return timing.Run(name, tmp_path / name / "kept.json", lambda: [[sys.executable, "-c", code]], values)

    runs = [
        made("first", f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); print('one')"),
        made(
            "second", f"import pathlib, time; time.sleep(1); assert pathlib.Path({str(flag)!r}).exists(); print('two')"
        ),
    ]
    with pytest.raises(subprocess.CalledProcessError):
        timing.measure(runs, 0)
    flag.touch()
    assert timing.measure(runs, 0) == {"first": {"lines": ["one"]}, "second": {"lines": ["two"]}}
    assert (tmp_path / "ran").read_text() == "x"


def test_the_time_of_a_teacher_is_part_of_the_training_time(timing, small, tmp_path, capsys):
    trainer = make_trainer(small, tmp_path, "sprint", ["epochs=1", "batch_size=90"])
    run(trainer, resume=False)
    (tmp_path / "test.json").write_text('{"accuracy": 0.5}')
    trainer.folder.write_history([line | {"validation_accuracy": 0.9} for line in trainer.state.history])
    lines = [(5.0, line) for line in capsys.readouterr().out.splitlines()]
    ended = [timing.Timed(100, [(7.0, "epoch  1/1 of the teacher")]), timing.Timed(50, lines), timing.Timed(3, [])]
    measured = timing.training_values(get_recipe("sprint"), RunFolder(tmp_path), ended)
    assert measured == {
        "accuracy": 0.5,
        "validation_accuracy": 0.9,
        "train_seconds": 150,
        "teacher_seconds": 100,
        "evaluate_seconds": 3,
        "seconds_to_study": 105,
    }


def test_a_teacher_is_trained_first_with_the_same_images_held_out(timing, tmp_path):
    choice = timing.choose("deep-fast teacher=fast distillation=0.9 validation_images=700")
    teacher, student, evaluate = timing.training(choice, tmp_path, 2, ["--device", "cpu"])
    teacher_runs = str(tmp_path / "teacher fast+validation_images=700")
    assert teacher[2:] == (
        "cifar_core.train", "fast", "--seed", "2", "--runs", teacher_runs,
        "--set", "validation_images=700", "--set", "split_seed=0", "--device", "cpu",
    )  # fmt: skip
    assert student[student.index("--teacher") + 1] == f"{teacher_runs}/fast+validation_images=700/2"
    assert student[2:4] == ("cifar_core.train", "deep-fast")
    assert f"{teacher_runs}/deep-fast+distillation=0.9+validation_images=700/2" in evaluate
    assert choice.name == "deep-fast+distillation=0.9+validation_images=700, teacher fast+validation_images=700"
    alone = timing.choice_flops(timing.choose("deep-fast distillation=0.9"), 10, 100)
    teaching = timing.choice_flops(timing.choose("fast"), 10, 100)
    together = timing.choice_flops(timing.choose("deep-fast distillation=0.9 teacher=fast"), 10, 100)
    assert alone + teaching < together < alone + 1.2 * teaching


def test_an_interrupted_run_is_removed_and_a_run_of_another_command_is_not(timing, tmp_path):
    choice = timing.choose("sprint epochs=1 distillation=0.5 teacher=fast")
    folder, teacher = choice.folder(tmp_path, 3), choice.teacher_folder(tmp_path, 3)
    timing.training(choice, tmp_path, 3, [])
    for each in (folder, teacher):
        each.path.mkdir(parents=True)
    timing.training(choice, tmp_path, 3, [])
    assert not folder.path.exists()
    assert not teacher.path.exists()
    other = choice.folder(tmp_path, 4)
    other.path.mkdir()
    with pytest.raises(SystemExit, match="was not started by this command"):
        timing.training(choice, tmp_path, 4, [])
    assert other.path.exists()


def test_the_programs_of_a_recipe_have_its_changes_and_the_data(timing, tmp_path):
    choice = timing.choose("sprint epochs=1")
    train, evaluate = timing.training(choice, tmp_path, 3, ["--device", "cpu", "--data", "synthetic"])
    assert train[2:] == (
        "cifar_core.train", "sprint", "--seed", "3", "--runs", str(tmp_path), "--set", "epochs=1",
        "--device", "cpu", "--data", "synthetic",
    )  # fmt: skip
    assert evaluate[-2:] == ("--data", "synthetic")


def test_more_runs_than_fit_into_memory_are_refused(timing, tmp_path):
    run_of_nothing = timing.Run("x", tmp_path / "x.json", lambda: [], lambda _: {})
    with pytest.raises(SystemExit, match=r"name fewer --recipes, or let one run follow the other with --turn 0"):
        timing.measure([run_of_nothing] * 10_000, 30)
