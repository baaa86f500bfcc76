import json
import shutil
from pathlib import Path

import pytest

from cifar_core.run_folder import RunError
from cifar_core.study.keeping import copy_histories
from cifar_core.study.runs import ReportError, read_runs, rows_of
from tests.cifar_core.runs import contents
from tests.cifar_core.study.made_up_runs import DATA, history, weights, write_run


def test_runs_from_other_weights_or_with_another_teacher_are_no_further_seeds(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs, "baseline", history(0.7))
    write_run(runs, "baseline", history(0.8), initial=weights("one", "a"))
    write_run(runs, "baseline", history(0.9), initial=weights("two", "b"))
    write_run(runs / "x", "deep-distilled", history(0.7), teacher=weights("one", "a"))
    write_run(runs / "y", "deep-distilled", history(0.8), teacher=weights("two", "b"))
    rows = rows_of(read_runs(runs))
    assert {row.name: (len(row.runs), row.published is not None) for row in rows} == {
        "baseline": (1, True),
        "baseline+init=aaaaaaaa": (1, False),
        "baseline+init=bbbbbbbb": (1, False),
        "deep-distilled+teacher=aaaaaaaa": (1, False),
        "deep-distilled+teacher=bbbbbbbb": (1, False),
    }
    copy_histories(read_runs(runs), tmp_path / "kept")
    kept = {run.folder.path.relative_to(tmp_path / "kept"): run for run in read_runs(tmp_path / "kept")}
    assert {str(path): run.history for path, run in kept.items()} == {
        f"fp32/{run.name}/0": run.history for run in read_runs(runs)
    }
    copy_histories(read_runs(runs), tmp_path / "kept")  # the same ones again


def test_the_history_of_another_run_is_not_overwritten(tmp_path, caplog):
    write_run(tmp_path / "one", "baseline", history(0.7), test=0.6)
    copy_histories(read_runs(tmp_path / "one"), tmp_path / "kept")
    kept = tmp_path / "kept/fp32/baseline/0"
    before = contents(kept)
    assert before.keys() == {"recipe.json", "history.jsonl", "test.json"}
    # Data, split or weights may differ under the same name.
    write_run(tmp_path / "two", "baseline", history(0.8), data=DATA | {"fingerprint": "b" * 64})
    with pytest.raises(ReportError, match=r"kept.*baseline/0 holds the history of another run .*\(different: data\)"):
        copy_histories(read_runs(tmp_path / "two"), tmp_path / "kept")
    assert contents(kept) == before
    assert not caplog.text
    # The same run trained anew replaces it, and a test accuracy of the earlier weights does not stay.
    write_run(tmp_path / "three", "baseline", history(0.8))
    copy_histories(read_runs(tmp_path / "three"), tmp_path / "kept")
    assert "the history of an earlier training is replaced" in caplog.text
    assert contents(kept).keys() == {"recipe.json", "history.jsonl"}
    assert read_runs(kept)[0].best["validation_accuracy"] == 0.8


@pytest.mark.parametrize("sources", [("teacher",), ("initial",), ("initial", "teacher")])
@pytest.mark.parametrize("both", [False, True])
def test_a_history_that_was_kept_under_an_earlier_name_is_moved(tmp_path, caplog, sources, both):
    chosen = {source: weights(source, "a") for source in sources}
    for seed in (0, 1):
        write_run(tmp_path / "runs", "baseline", history(0.7), seed, **chosen)
    runs, kept = read_runs(tmp_path / "runs"), tmp_path / "kept/fp32"
    new, old = kept / runs[0].name, kept / "baseline"
    copy_histories(runs, tmp_path / "kept")
    assert not caplog.text
    (new / "0/test.json").write_text('{"accuracy": 0.6, "per_class": {}}')
    if both:  # as an earlier version left it, which did not look for the other name
        shutil.copytree(new, old)
    else:
        new.rename(old)
    write_run(kept, "baseline", history(0.7), 2, teacher=weights("another", "b"))
    copy_histories(runs, tmp_path / "kept")
    assert caplog.text.count("under its earlier name") == 2
    assert sorted(path.name for path in old.iterdir()) == ["2"]
    found = read_runs(tmp_path / "kept")
    assert sorted(run.folder.path.relative_to(kept) for run in found) == [
        Path("baseline/2"),
        *(Path(runs[0].name, seed) for seed in "01"),
    ]
    assert contents(new / "0").keys() == {"recipe.json", "history.jsonl", "test.json"}


def test_a_history_is_moved_to_its_new_name_when_it_is_kept_in_its_own_folder(tmp_path):
    write_run(tmp_path / "fp32", "deep-distilled", history(0.7), teacher=weights("one", "a"))
    copy_histories(read_runs(tmp_path), tmp_path)
    (run,) = read_runs(tmp_path)
    assert str(run.folder.path.relative_to(tmp_path)) == "fp32/deep-distilled+teacher=aaaaaaaa/0"
    assert [path.name for path in (tmp_path / "fp32").iterdir()] == ["deep-distilled+teacher=aaaaaaaa"]


def test_a_run_with_weights_is_not_moved_where_histories_are_kept(tmp_path):
    whole = write_run(tmp_path / "fp32", "deep-distilled", history(0.7), teacher=weights("one", "a"))
    (whole / "best.pt").write_text("weights")
    before = contents(whole)
    copy_histories(read_runs(tmp_path), tmp_path)
    assert contents(whole) == before


def test_our_committed_histories_have_the_names_that_keep_gives_them():
    ours = Path("docs/results/ours")
    for run in read_runs(ours):
        assert run.folder.path == ours / run.precision / run.name / str(run.seed)


def test_the_same_seed_twice_is_refused(tmp_path):
    write_run(tmp_path / "a", "baseline", history(0.7))
    write_run(tmp_path / "b", "baseline", history(0.8))
    with pytest.raises(ReportError, match=r"a/baseline/0 and .*b/baseline/0 are both seed 0 of baseline in fp32"):
        read_runs(tmp_path)
    assert len(read_runs(tmp_path / "b")) == 1


def test_only_the_runs_below_the_given_folder_are_reported(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_run(runs, "baseline", history(0.7), seed)
    write_run(runs, "deep", history(0.7))

    def found(folder):
        return [str(run.folder.path.relative_to(folder)) for run in read_runs(folder)]

    assert found(runs) == ["baseline/0", "baseline/1", "deep/0"]
    assert found(tmp_path) == ["runs/baseline/0", "runs/baseline/1", "runs/deep/0"]
    assert found(runs / "baseline") == ["0", "1"]
    assert found(runs / "baseline/1") == ["."]
    # Links to folders are followed as deep as a folder of runs goes, and no run is counted twice.
    (tmp_path / "linked").mkdir()
    for name in ("baseline", "deep"):
        (tmp_path / "linked" / name).symlink_to(runs / name)
    assert found(tmp_path / "linked") == ["baseline/0", "baseline/1", "deep/0"]
    (runs / "best").symlink_to(runs / "deep")
    assert len(found(runs)) == 3


def test_unfinished_runs_are_left_out(tmp_path):
    write_run(tmp_path, "baseline", history(0.7))
    unfinished = write_run(tmp_path, "dropout-0.2", history(0.7))
    lines = (unfinished / "history.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "history.jsonl").write_text("".join(lines[:-1]))
    assert [run.recipe.name for run in read_runs(tmp_path)] == ["baseline"]


def test_a_folder_without_runs_or_with_runs_on_different_data_is_refused(tmp_path):
    with pytest.raises(ReportError, match="there is no finished run in this folder"):
        read_runs(tmp_path)
    write_run(tmp_path, "baseline", history(0.7))
    write_run(tmp_path, "deep", history(0.7), data=DATA | {"name": "others", "fingerprint": "b" * 64})
    with pytest.raises(ReportError, match=r"different data, others \(bbbbbbbbbbbb\), pictures \(aaaaaaaaaaaa\)"):
        read_runs(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"accuracy": 1}'])
def test_a_damaged_test_result_is_refused_by_name(tmp_path, content):
    (write_run(tmp_path, "baseline", history(0.7)) / "test.json").write_text(content)
    with pytest.raises(RunError, match=r"test\.json: .*remove it"):
        read_runs(tmp_path)


def test_a_run_whose_recipe_cannot_be_read_is_named(tmp_path):
    folder = write_run(tmp_path, "baseline", history(0.7))
    description = json.loads((folder / "recipe.json").read_text())
    description["recipe"]["layers"] = 3
    (folder / "recipe.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match=r"recipe\.json: this version has no recipe value 'layers'; train again"):
        read_runs(tmp_path)
