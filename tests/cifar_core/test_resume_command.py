import shlex
from pathlib import Path

import pytest

from cifar_core.resume_command import resume_command

LARGE = "small+learning_rate=1e+30"
SYNTHETIC = {"kind": "synthetic", "name": "synthetic, 300 images"}


def description(recipe="small", seed=0, kind="cifar10", name="CIFAR-10, official archive", **more):
    return {"recipe": {"name": recipe}, "seed": seed, "data": {"kind": kind, "name": name}, **more}


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    monkeypatch.delenv("CIFAR10_DATA", raising=False)


@pytest.mark.parametrize(
    ("run", "about", "data", "options"),
    [
        ("runs/small/0", {}, None, "small"),
        ("runs/small/3", {"seed": 3}, None, "small --seed 3"),
        ("elsewhere/small/0", {}, None, "small --runs elsewhere"),
        ("/a b/small/0", {}, "my data", "small --data 'my data' --runs '/a b'"),
        (
            "runs/small+epochs=100+sizes=20:4,24:10/0",
            {"recipe": "small+epochs=100+sizes=20:4,24:10"},
            None,
            "small --set epochs=100 --set sizes=20:4,24:10",
        ),
        (f"runs/{LARGE}/0", {"recipe": LARGE}, None, "small --set learning_rate=1e+30"),
        ("synthetic/runs/small/0", SYNTHETIC, None, "small --data synthetic:300"),
        ("runs/small/0", {"kind": "folder", "name": "pictures"}, None, "small --data FOLDER"),
    ],
)  # fmt: skip
def test_the_command_has_the_options_of_the_run(run, about, data, options):
    assert resume_command(Path(run), description(**about), data) == f"python -m cifar_core.train {options} --resume"


def test_the_data_that_the_environment_names_needs_no_option(monkeypatch):
    monkeypatch.setenv("CIFAR10_DATA", "pictures")
    command = resume_command(Path("runs/small/0"), description(kind="folder", name="pictures"))
    assert command == "python -m cifar_core.train small --resume"


def test_weights_and_teacher_which_a_run_records_without_their_paths_are_described():
    about = description(
        initial={"name": "deep-0-abc", "weights": "0123456789"}, teacher={"name": "long, seed 0", "weights": "9"}
    )
    assert resume_command(Path("runs/small+init=01234567/0"), about) == (
        "python -m cifar_core.train small --init WEIGHTS --teacher TEACHER --resume "
        "(WEIGHTS: deep-0-abc; TEACHER: long, seed 0)"
    )


def test_a_run_whose_folder_was_renamed_is_moved_back_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = resume_command(tmp_path / "my run", description("small+epochs=2", 1))
    *moves, train = command.split(" && ")
    place = tmp_path / "small+epochs=2"
    assert [shlex.split(move) for move in moves] == [
        ["mkdir", "-p", str(place)],
        ["mv", str(tmp_path / "my run"), str(place / "1")],
    ]
    assert train == f"python -m cifar_core.train small --set epochs=2 --seed 1 --runs {tmp_path} --resume"


def test_a_relative_path_is_understood(tmp_path, monkeypatch):
    (tmp_path / "all" / "small" / "0").mkdir(parents=True)
    for place, run in ((tmp_path / "all/small", "0"), (tmp_path / "all/small/0", "."), (tmp_path / "all", "small/0")):
        monkeypatch.chdir(place)
        command = resume_command(Path(run), description())
        runs = Path(shlex.split(command)[shlex.split(command).index("--runs") + 1])
        assert runs.resolve() == tmp_path / "all"
