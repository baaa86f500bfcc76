"""Made-up runs for tests of reports: histories without weights."""

import json

from cifar_core.recipes import RECIPES
from cifar_core.run_folder import folder_name

DATA = {"kind": "folder", "name": "pictures", "fingerprint": "a" * 64}


def history(best, epochs=20, at=18, last=None, loss_rises_after=13):
    """A made-up history whose validation accuracy is best at one epoch, and `last` in all others."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2 - 1.8 * epoch / epochs,
            "train_accuracy": 0.2 + 0.75 * epoch / epochs,
            "validation_loss": 1 + 0.1 * abs(epoch - loss_rises_after),
            "validation_accuracy": best if epoch == at else (last if last is not None else best - 0.01),
            "learning_rate": 0.001,
            "seconds": 30.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def write_run(runs, recipe, lines, seed=0, precision="fp32", data=DATA, test=None, **sources):
    """Writes a run without weights. `sources` may be `initial` and `teacher`, as in recipe.json."""
    initial = sources.get("initial")
    folder = runs / folder_name(recipe, initial["weights"] if initial else None) / str(seed)
    folder.mkdir(parents=True)
    values = RECIPES[recipe.partition("+")[0]].values() | {"name": recipe, "epochs": len(lines)}
    about = {"recipe": values, "seed": seed, "precision": precision, "data": data, "classes": ["a", "b"]}
    (folder / "recipe.json").write_text(json.dumps(about | sources))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if test is not None:
        (folder / "test.json").write_text(json.dumps({"accuracy": test, "per_class": {"a": test, "b": test}}))
    return folder


def weights(name, digit):
    return {"name": name, "weights": digit * 64}
