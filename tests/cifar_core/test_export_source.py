import dataclasses
import shlex

import pytest

from cifar_core import export
from cifar_core.device import CPU
from cifar_core.export import export_run, main
from cifar_core.export_source import ExportError, pick_run
from cifar_core.publish import PublishError
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunError, RunFolder
from cifar_core.stop_signal import StopSignal
from cifar_core.trainer import Trainer
from tests.cifar_core.runs import contents, make_run
from tests.cifar_core.training import trained


def test_the_run_with_the_best_accuracy_on_common_held_out_images_is_exported(small, tmp_path):
    good = trained(small, tmp_path, "epochs=6", validation_accuracy=0.6)
    # A worse run, whose few validation images flatter it.
    trained(small, tmp_path, "epochs=1", "learning_rate=0.001", "validation_images=20", validation_accuracy=0.9)
    unfinished = make_run(small, tmp_path, "deep", 0.95, seed=2)
    unfinished.write_history([])
    unfinished.last.unlink()
    assert pick_run(tmp_path, small).path == good.path


def test_runs_without_common_held_out_images_cannot_be_compared(small, tmp_path):
    make_run(small, tmp_path, "deep", 0.6)
    other = make_run(small, tmp_path, "dropout-0.2", 0.6)
    description = other.description()
    description["recipe"]["split_seed"] = 1
    other.write_description(description)
    with pytest.raises(ExportError, match=r"only \d held-out images in common, .*; choose one with --run DIR"):
        pick_run(tmp_path, small)


def test_the_error_without_a_finished_run_says_how_to_train_one(small, tmp_path):
    with pytest.raises(ExportError, match=r"there is no finished run on .* in this folder; train one with: make train"):
        pick_run(tmp_path, small)
    make_run(small, tmp_path, "deep", 0.6)  # a run on other data is no candidate
    with pytest.raises(ExportError, match="no finished run"):
        pick_run(tmp_path, dataclasses.replace(small, fingerprint="other"))


def test_the_command_that_the_error_for_an_unfinished_run_names_continues_it(small, tmp_path, command):
    recipe = get_recipe("sprint", ["batch_size=27", "sizes=", "width=4", "epochs=2"])
    run = RunFolder(tmp_path / "my runs" / recipe.name / "3")
    trainer = Trainer(recipe, small, run, 3, CPU, "fp32")
    with run.lock():
        trainer.start(resume=False)
        next(iter(trainer.epochs(StopSignal())))
    assert not run.is_finished()
    options = ("--data", "synthetic:300", "--run", run.path, "--output", "exported")
    done = command("cifar_core.export", *options)
    assert done.returncode == 2
    advice = done.stderr.rpartition("continue it with: ")[2]
    assert advice.startswith("python -m cifar_core.train sprint --set batch_size=27 ")
    _, *module, recipe_name = shlex.split(advice)[:4]
    assert module == ["-m", "cifar_core.train"]
    continued = command(module[1], recipe_name, *shlex.split(advice)[4:])
    assert continued.returncode == 0, continued.stderr
    assert run.is_finished()


def test_a_run_that_this_version_cannot_read_is_named(small, tmp_path):
    for name in ("deep", "dropout-0.2"):
        make_run(small, tmp_path, name, 0.5)
    run = RunFolder(tmp_path / "deep" / "0")
    description = run.description()
    description["recipe"]["unknown"] = 1
    run.write_description(description)
    for export_it in (lambda: pick_run(tmp_path, small), lambda: export_run(run, small, tmp_path / "exported")):
        with pytest.raises(RunError, match=rf"^{run.path}.*this version has no recipe value 'unknown'"):
            export_it()


@pytest.mark.parametrize("option", ["--run", "--runs", "--output"])
def test_an_empty_path_is_refused(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["export", option, ""])
    with pytest.raises(SystemExit):
        main()
    assert f"argument {option}: it is empty" in capsys.readouterr().err


def test_a_folder_that_must_not_be_replaced_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_dataset", None)
    (tmp_path / "manifest.json").write_text('{"name": "web application"}')
    monkeypatch.setattr("sys.argv", ["export", "--output", str(tmp_path)])
    with pytest.raises(PublishError, match=r"manifest\.json: this file is not part of an export"):
        main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["export", "--output", "."])
    with pytest.raises(PublishError, match="is the current folder"):
        main()
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_a_default_folder_that_must_not_be_replaced_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "synthetic" / "exported"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"of something else")
    monkeypatch.setattr(export, "pick_run", None)
    monkeypatch.setattr("sys.argv", ["export", "--data", "synthetic:60"])
    with pytest.raises(PublishError, match=r"model\.onnx: this file is not part of an export"):
        main()


def test_weights_of_another_run_are_refused(small, tmp_path):
    run, other = (make_run(small, tmp_path / name, "deep", 0.5, seed) for seed, name in enumerate("ab"))
    run.best.write_bytes(other.best.read_bytes())
    with pytest.raises(ExportError, match=r"best\.pt: these weights are not those of this run, but of deep, seed 1"):
        export_run(run, small, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
